"""Jobs that meet damage: flipped bytes, other jobs, killed launchers, diverged memories. One message, no hang."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from megatron_fwpkm.train.checkpoint import MANIFEST_FILE, _describe_files

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def _refused(job: TinyJob, words: str, *overrides: str) -> None:
    output = job.train(*overrides, expected=2)
    assert words in output and "Traceback" not in output, output


def test_damaged_checkpoints_are_refused_and_older_ones_serve(tiny_job: TinyJob) -> None:
    tiny_job.train("training.stop_after_step=4")
    checkpoints = tiny_job.folder / "run" / "checkpoints"
    newest = checkpoints / "step_00000004"
    weights = newest / "slow" / "mp_rank_00_model_states.pt"
    _flip(weights)
    _refused(tiny_job, "step_00000004 is damaged (slow/mp_rank_00_model_states.pt)")
    _flip(weights)
    description = json.loads((newest / "job.json").read_text())
    description["corpus"]["tokenizer"] = "0"
    (newest / "job.json").write_text(json.dumps(description))
    (newest / MANIFEST_FILE).write_text(json.dumps(_describe_files(newest)))
    _refused(tiny_job, "another corpus or tokenizer")
    (newest / MANIFEST_FILE).unlink()  # as half of a deletion would leave it: not a checkpoint any more
    output = tiny_job.train("training.stop_after_step=4")
    assert "step_00000002" in output and (newest / MANIFEST_FILE).is_file()


def test_damaged_shard_is_found_before_anything_starts(tiny_job: TinyJob, tmp_path: Path) -> None:
    data = f"data.directory={tmp_path / 'data'}"
    tiny_job.train("training.stop_after_step=2", data)
    shard = next((tmp_path / "data").glob("*/validation/shard.00000.mds.zstd"))
    _flip(shard)
    _refused(tiny_job, f"{shard} is damaged", data, f"run_directory={tmp_path / 'other'}")


def test_second_job_on_a_run_directory_is_refused_and_orphans_end(tiny_job: TinyJob) -> None:
    first = tiny_job.start(*tiny_job.command("training.steps=100000", "checkpoint.every=100000"))
    metrics = tiny_job.folder / "run" / "metrics.jsonl"
    while not metrics.exists():
        assert first.poll() is None
    _refused(tiny_job, "another job is running", "training.steps=100000", "checkpoint.every=100000")
    assert first.poll() is None
    (launcher,) = psutil.Process(first.pid).children()
    workers = launcher.children()
    assert len(workers) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    first.wait(timeout=60)
    assert (tiny_job.folder / "run" / "checkpoints" / "latest").is_file()


def test_diverged_memory_ends_the_job(tiny_job: TinyJob) -> None:
    _refused(
        tiny_job,
        "training has diverged",
        *("model.memory.learning_rate=2e9", "training.steps=30", "training.max_skipped_steps=3"),
    )
