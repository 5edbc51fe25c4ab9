"""Writes tests/checkpoint/kept: a run as today's program leaves it, for later ones to read.

`python -m tests.checkpoint.make_kept`, where the format has changed on purpose: a job of two tensor-parallel ranks, two
steps, with every kind of state, and beside it what is in it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from megatron_fwpkm.convert.source import model_of_run
from tests.checkpoint.test_kept import KEPT, hashes, tokens_of
from tests.checkpoints import whole_tensors
from tests.distributed.conftest import TinyJob, environment

LAYOUT = (
    *("parallel.tensor=2", "training.steps=4", "training.stop_after_step=2", "logging.samples=0", "evaluation.every=0"),
    *("model.hidden_size=8", "model.key_value_heads=2", "model.head_dim=8", "model.mlp_size=8"),
    *("model.memory.n_subkeys=4", "model.memory.k_dim=8", "model.memory.v_dim=6", "model.pkm_layers=[0]"),
    "model.pkm={heads: 1, topk: 2, n_subkeys: 4, k_dim: 8, v_dim: 6}",
    *("run_directory=run", "data.vocab_size=270"),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = TinyJob(Path(folder), Path("data"))
        # There, so that paths in the run's files are relative ones.
        subprocess.run(job.command(*LAYOUT), env=environment(), cwd=folder, check=True)
        run = Path(folder, "run")
        (checkpoint,) = (run / "checkpoints").glob("step_*")
        shutil.rmtree(KEPT, ignore_errors=True)
        shutil.copytree(checkpoint, KEPT / "checkpoints" / checkpoint.name)
        shutil.copy(run / "config.yaml", KEPT)
    (KEPT / "hashes.json").write_text(json.dumps(hashes(whole_tensors(checkpoint_of(KEPT))), indent=1) + "\n")
    with torch.no_grad():
        logits_BTV = model_of_run(KEPT).decoder.eval().logits(tokens_of())
    np.save(KEPT / "logits.npy", logits_BTV.numpy())


def checkpoint_of(run: Path) -> Path:
    """Its only one."""
    (found,) = (run / "checkpoints").glob("step_*")
    return found


if __name__ == "__main__":
    main()
