"""Recall through the same engine as any job: training, resuming, and measuring against the twin without memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

RECALL = Path(__file__).parents[2] / "launch" / "recall.py"
OVERRIDES = (
    "data.source=recall",
    "data.recall.pairs=8",
    "data.recall.questions=4",
    "data.recall.keys=32",
    "data.recall.values=8",
    "data.recall.fillers=8",
    "model.memory.reset=per_sequence",
    "model.memory.chunk_size=64",
    "training.steps=4",
)


def _losses(job: TinyJob, run: str) -> list[tuple[float, ...]]:
    names = ("step", "train/loss", "train/gradient_norm", "memory/block_1/memory_loss")
    return [tuple(record[name] for name in names) for record in job.records(run) if "train/loss" in record]


def test_resuming_goes_on_with_the_sequences_that_follow_and_a_twin_is_compared(tiny_job: TinyJob) -> None:
    folder = tiny_job.folder
    checkpoint = folder / "run" / "checkpoints" / "step_00000004"
    tiny_job.train_ranks(*OVERRIDES)
    once = _losses(tiny_job, "run")
    assert len({loss for _, loss, _, _ in once}) == 4
    shutil.rmtree(checkpoint)
    assert "resumed from" in tiny_job.train_ranks(*OVERRIDES)
    assert _losses(tiny_job, "run") == once
    # 4 steps of 2 microbatches of 2 sequences on 2 processes.
    assert json.loads((checkpoint / "job.json").read_text())["data_cursor"] == {"sequence": 4 * 2 * 2 * 2}

    tiny_job.train_ranks(*OVERRIDES, f"run_directory={folder / 'plain'}", "model.memory_layers=[]")
    runs = ["--run", str(folder / "run"), "--against", str(folder / "plain")]
    process = tiny_job.start(sys.executable, str(RECALL), "--answers", "16", *runs)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "8 pairs" in output and "12.5 %" in output  # 8 values: chance
    content = json.loads((folder / "run" / "recall.json").read_text())
    assert content["step"] == 4 and len(content["claims"]) == 5
    assert {figure["memory"] for figure in content["figures"]} == {True, False}
    for name in ("recall-readings.png", "recall-lengths.png"):
        assert (folder / "run" / name).read_bytes().startswith(b"\x89PNG")
