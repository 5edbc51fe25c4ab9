"""Whole training jobs of two processes: resuming, stopping, ending, failing."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


def _steps(records: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """What must be the same bits in two runs, step by step."""
    names = ["step", "train/loss", "train/gradient_norm", "train/learning_rate", "memory/block_1/memory_loss"]
    return [tuple(record[name] for name in names) for record in records if "train/loss" in record]


def _evaluations(records: list[dict[str, Any]]) -> list[float]:
    return [record["evaluation/perplexity"] for record in records if "evaluation/perplexity" in record]


def _assert_same_checkpoint(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        tensors, others = load_file(one / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(value, others[key]) for key, value in tensors.items()), name
    weights, others = (
        torch.load(folder / "slow" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        for folder in (one, other)
    )
    for key, value in weights.items():
        assert value is None or torch.equal(value, others[key]), key


def _wait_for(condition: Any, process: Any, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.stdout.read()}"
        assert time.monotonic() < deadline, f"no {what} in 120 s"
        time.sleep(0.05)


def _left_behind() -> list[str]:
    return [path.name for path in Path(tempfile.gettempdir()).glob("fwpkm-job-*")]


def test_resumed_run_is_bitwise_the_uninterrupted_one(tiny_job: TinyJob) -> None:
    whole = f"run_directory={tiny_job.folder / 'whole'}"
    output = tiny_job.train(whole)
    assert "training loss" in output and "held-out perplexity" in output
    assert "stopped after step 3" in tiny_job.train("training.stop_after_step=3")
    assert "step 3" in tiny_job.train()
    expected, found = tiny_job.records("whole"), tiny_job.records()
    assert len(_steps(expected)) == 6
    assert _steps(found) == _steps(expected)
    assert _evaluations(found) == _evaluations(expected)
    last = Path("checkpoints", "step_00000006")
    _assert_same_checkpoint(tiny_job.folder / "whole" / last, tiny_job.folder / "run" / last)
    assert not _left_behind()

    # Once complete: nothing to train, measured again, the same result.
    output = tiny_job.train()
    assert "final checkpoint" in output and "nothing left" in output
    assert _evaluations(tiny_job.records()) == _evaluations(expected) * 2
    assert json.loads((tiny_job.folder / "run" / "summary.json").read_text())["step"] == 6


def test_mistakes_end_with_one_line_and_status_2(tiny_job: TinyJob) -> None:
    tiny_job.train("training.stop_after_step=2")
    output = tiny_job.train("optimizer.learning_rate=0.5", expected=2)
    assert "error: " in output and "optimizer.learning_rate" in output and "Traceback" not in output
    output = tiny_job.train("training.micro_batch_size=500", "evaluation.sequences=1000", expected=2)
    assert "sequences" in output and "Traceback" not in output
    (tiny_job.folder / "file").write_text("")
    output = tiny_job.train(f"run_directory={tiny_job.folder / 'file' / 'run'}", expected=2)
    assert "run_directory" in output and "Traceback" not in output
    output = tiny_job.train("parallel.processes=1", expected=2)
    assert "parallel.processes" in output and "Traceback" not in output


def test_memories_of_replicas_differ_and_both_are_saved(tiny_job: TinyJob) -> None:
    tiny_job.train("training.stop_after_step=2")
    folder = tiny_job.folder / "run" / "checkpoints" / "step_00000002" / "fast_state"
    files = [folder / f"replica_0000{replica}" / "block_001.safetensors" for replica in (0, 1)]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends_cleanly(tiny_job: TinyJob, number: signal.Signals) -> None:
    process = tiny_job.start(*tiny_job.command("training.steps=100000", "checkpoint.every=100000"))
    _wait_for(lambda: len(tiny_job.records()) >= 3, process, "third step")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    last = _steps(tiny_job.records())[-1][0]
    assert (tiny_job.folder / "run" / "checkpoints" / "latest").read_text().strip() == f"step_{int(last):08d}"
    assert not _left_behind()


def test_second_signal_ends_all_processes_at_once(tiny_job: TinyJob) -> None:
    process = tiny_job.start(*tiny_job.command("training.steps=100000", "checkpoint.every=100000"))
    _wait_for(lambda: len(tiny_job.records()) >= 3, process, "third step")
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3  # the launcher and two processes
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
    assert not _left_behind()


def test_killed_command_lets_the_processes_save_and_the_next_start_cleans_up(tiny_job: TinyJob) -> None:
    overrides = ("training.steps=100000", "checkpoint.every=100000")
    process = tiny_job.start(*tiny_job.command(*overrides))
    _wait_for(lambda: len(tiny_job.records()) >= 3, process, "third step")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    latest = tiny_job.folder / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + 60
    while not latest.exists():
        assert time.monotonic() < deadline, "no checkpoint after the command was killed"
        time.sleep(0.05)
    step = int(latest.read_text().strip().removeprefix("step_"))
    output = tiny_job.train(*overrides, f"training.stop_after_step={step + 2}")
    assert f"step {step}" in output
    assert [int(row[0]) for row in _steps(tiny_job.records())] == list(range(1, step + 3))


def test_kill_in_the_middle_of_saving_leaves_the_last_checkpoint(tiny_job: TinyJob) -> None:
    tiny_job.train("training.stop_after_step=2")
    checkpoints = tiny_job.folder / "run" / "checkpoints"
    partial = checkpoints / ".step_00000004.partial"
    partial.mkdir()
    (partial / "job.json").write_text("{")
    (checkpoints / "latest").unlink()  # killed between the rename and the pointer: the newest complete one counts
    output = tiny_job.train("training.stop_after_step=4")
    assert "step_00000002" in output
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000002", "step_00000004"]


def test_under_torchrun(tiny_job: TinyJob) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = tiny_job.start(*launcher, *tiny_job.command("training.stop_after_step=2", "training.precision=bf16")[1:])
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert len(_steps(tiny_job.records())) == 2
    assert not _left_behind()
