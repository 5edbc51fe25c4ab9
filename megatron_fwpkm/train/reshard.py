"""Writing a checkpoint again as a job of another layout would: loaded by that job's processes, saved by them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch.distributed

from megatron_fwpkm.checkpoint.files import TENSORS
from megatron_fwpkm.checkpoint.parts import WEIGHTS
from megatron_fwpkm.checkpoint.store import CheckpointStore, check_batch
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.config import TrainConfig, load_train_config, to_yaml
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import write_atomically
from megatron_fwpkm.parallel import topology as parallel
from megatron_fwpkm.terminal import print_line
from megatron_fwpkm.train.engine import build_training
from megatron_fwpkm.train.job import build_model, checkpoint_parts, describe_layout
from megatron_fwpkm.train.layout import check_processes
from megatron_fwpkm.train.run_directory import lock_run_directory
from megatron_fwpkm.train.stop import end_with_parent

CHANGEABLE = (
    "parallel.",
    "training.zero_stage=",
    "training.micro_batch_size=",
    "training.gradient_accumulation=",
    "checkpoint.",
)


def reshard_config(run: Path, out: Path, overrides: Sequence[str]) -> TrainConfig:
    """The run's configuration in the new layout, for the directory `out`.

    Raises UserError if the folder holds no run, `out` holds one, or an override changes more than the layout.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} holds no run (it has no config.yaml); give the run directory of a training run")
    if (out / "config.yaml").exists() or any((out / "checkpoints").glob("step_*")):
        raise UserError(f"{out} holds a run already; give another directory to write to")
    wrong = [text for text in overrides if not text.startswith(CHANGEABLE)]
    if wrong:
        allowed = ", ".join(key.rstrip("=") for key in CHANGEABLE)
        raise UserError(f"override {wrong[0]!r}: resharding can change {allowed} only")
    return load_train_config(path, [*overrides, f"run_directory={out}"])


def reshard(config: TrainConfig, source: Path) -> None:
    """Load a checkpoint and save it into config.run_directory, as one rank of the new layout; all call this.

    Raises SharedUserError if the checkpoint is damaged or does not fit the layout.
    """
    end_with_parent()
    check_processes(config, int(os.environ["WORLD_SIZE"]))
    ranks = parallel.initialize(config.parallel)
    out = Path(config.run_directory)
    say: Callable[[str], None] = print_line if ranks.is_leader else lambda line: None
    with ExitStack() as open_things:
        open_things.callback(parallel.shut_down)
        open_things.enter_context(
            parallel.agree_on_errors(
                lambda: lock_run_directory(out) if ranks.is_leader else nullcontext(), "locking the run directory"
            )
        )
        rows = parallel.on_leader(lambda: _vocabulary(source, ranks.tensor_ranks), f"reading {source}")
        model = build_model(config, ranks, rows)
        bundle = build_training(model, config.optimizer, config.training)
        parts = checkpoint_parts(bundle, model, ranks, config.checkpoint.memories)
        store = CheckpointStore(out / "checkpoints", ranks, parts, timeout_seconds=config.parallel.timeout_seconds)
        state = store.load_one(source, say)
        layout = describe_layout(config, ranks)
        for note in parallel.agree_on_errors(lambda: check_batch(state.layout, layout), "comparing batches"):
            say(note)
        store.save(replace(state, layout=layout))
        # Last: a configuration without a checkpoint would train from the beginning.
        parallel.on_leader(lambda: write_atomically(out / "config.yaml", to_yaml(config)), f"writing to {out}")
        for report in store.take_reports():
            say(str(report))
        torch.distributed.barrier()


def _vocabulary(source: Path, tensor_ranks: int) -> int:
    """Rows of the embedding. Raises UserError where they don't divide."""
    try:
        rows = SavedTensors(source / TENSORS).descriptions[f"{WEIGHTS}embedding.weight"].shape[0]
    except Exception as error:  # what a damaged pickle raises may be of any kind
        raise UserError(f"cannot read the tensors of {source} ({error!r}); give another --checkpoint") from error
    if rows % tensor_ranks:
        raise UserError(
            f"the embedding of {source} has {rows} rows, which can't be split over parallel.tensor={tensor_ranks} ranks"
        )
    return rows
