"""Whole training jobs of two processes: resuming, stopping, starting under other launchers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.checkpoints import differing, whole_tensors

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed
WHOLE = ("training.steps=24", "checkpoint.every=4", "checkpoint.keep_last_k=6")
ENDLESS = ("training.steps=100000", "checkpoint.every=100000", "logging.every=100000")


def _steps(records: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """What must be the same bits in two runs, step by step."""
    names = ["step", "train/loss", "train/gradient_norm", "train/learning_rate", "memory/block_1/memory_loss"]
    return [tuple(record[name] for name in names) for record in records if "train/loss" in record]


def _evaluations(records: list[dict[str, Any]]) -> list[float]:
    return [record["evaluation/perplexity"] for record in records if "evaluation/perplexity" in record]


def _assert_same_checkpoint(one: Path, other: Path) -> None:
    tensors = whole_tensors(one)
    assert len([name for name in tensors if name.startswith("fast_state/") and name.endswith("/keys")]) == 2
    assert differing(tensors, whole_tensors(other)) == []


def _left_behind() -> list[str]:
    return [path.name for path in Path(tempfile.gettempdir()).glob("fwpkm-job-*")]


def _assert_ends_with_a_checkpoint(job: TinyJob) -> None:
    last = int(_steps(job.records())[-1][0])
    assert (job.folder / "run" / "checkpoints" / "latest").read_text().strip() == f"step_{last:08d}"
    assert not _left_behind()


def test_a_run_killed_at_any_step_continues_bitwise_with_other_workers(tiny_job: TinyJob, whole_run: TinyJob) -> None:
    seed = random.SystemRandom().randrange(10**6)
    step = random.Random(seed).randint(5, 16)
    print(f"seed {seed}: killed after step {step}")
    process = tiny_job.start(*tiny_job.command(*WHOLE))
    tiny_job.wait_for_step(1, process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(everyone) >= 4
    tiny_job.wait_for_step(step, process)  # found before: where the machine is busy the job would end meanwhile
    for child in everyone:
        child.kill()
    process.wait()
    assert not (tiny_job.folder / "run" / "summary.json").exists()

    output = tiny_job.train(*WHOLE, "data.workers=2")
    assert "resumed from" in output
    expected, found = whole_run.records(), tiny_job.records()
    assert len(_steps(expected)) == 24
    assert _steps(found) == _steps(expected)
    assert _evaluations(found) == _evaluations(expected)
    last = Path("run", "checkpoints", "step_00000024")
    _assert_same_checkpoint(whole_run.folder / last, tiny_job.folder / last)
    assert not _left_behind()

    # Once complete: nothing to train, measured again, the same result.
    output = tiny_job.train(*WHOLE)
    assert "final checkpoint" in output and "nothing left" in output
    assert _evaluations(tiny_job.records()) == _evaluations(expected) * 2
    assert json.loads((tiny_job.folder / "run" / "summary.json").read_text())["step"] == 24


def test_the_run_directory_holds_what_it_promises(whole_run: TinyJob) -> None:
    run = whole_run.folder / "run"
    names = {"config.yaml", "environment.json", "logs", "metrics.jsonl", "tensorboard", "samples", "checkpoints"}
    assert names | {"summary.json", ".lock"} == {path.name for path in run.iterdir()}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 2 and environment["peak_flops_per_process"] > 0
    assert "launch/train.py" in environment["command"][0]
    lines = (run / "logs" / "train.log").read_text().splitlines()
    assert any("step 24/24" in line for line in lines) and all(line[:2] == "20" for line in lines)
    for rank in (0, 1):
        assert f"rank {rank} of 2" in (run / "logs" / f"rank_0000{rank}.log").read_text()
    assert (run / "samples" / "step_00000024.txt").read_text().count(">>>") == 5  # the title and four prompts
    record = whole_run.records()[3]
    parts = ("data", "forward", "backward", "update", "other")
    assert abs(sum(record[f"speed/{part}_seconds"] for part in parts) - record["speed/step_seconds"]) < 1e-6
    assert 0 < record["speed/mfu"] < 1
    saved = [f"step_{step:08d}" for step in range(4, 25, 4)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", *saved]
    tensors = whole_tensors(run / "checkpoints" / "step_00000024", "fast_state/")
    one, other = (tensors[f"fast_state/memory_0000{memory}/block_001/values.by_slot"] for memory in (0, 1))
    assert bool((one != other).any())  # each replica has its own memory


def test_mistakes_end_with_one_line_and_status_2(tiny_job: TinyJob, whole_run: TinyJob) -> None:
    checkpoints = tiny_job.begin_from(whole_run, 20, 24)
    for words, overrides in {
        "optimizer.learning_rate": [*WHOLE, "optimizer.learning_rate=0.5"],
        "8 sequences a step and this one has 4": [*WHOLE, "parallel.processes=1"],
        "sequences": [
            "training.micro_batch_size=500",
            "evaluation.sequences=1000",
            f"run_directory={tiny_job.folder / 'new'}",
        ],
        "another run_directory": [f"run_directory={tiny_job.config / 'run'}"],
    }.items():
        _refused(tiny_job, words, *overrides)
    # A checkpoint that is whole, but of another corpus: no damage, and no reason to go back to an older one.
    newest = checkpoints / "step_00000024"
    description = json.loads((newest / "job.json").read_text())
    description["corpus"]["tokenizer"] = "0"
    text = json.dumps(description).encode()
    (newest / "job.json").write_bytes(text)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["job.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    _refused(tiny_job, "another corpus or tokenizer", *WHOLE)


def _refused(job: TinyJob, words: str, *overrides: str) -> None:
    output = job.train(*overrides, expected=2)
    assert output.count("error: ") == 1 and words in output and "Traceback" not in output, output


def test_mistakes_under_torchrun_are_told_once(tiny_job: TinyJob, whole_run: TinyJob) -> None:
    tiny_job.begin_from(whole_run, 24)
    for words, override in {
        "did you mean `training.steps`?": "training.stepz=3",
        "optimizer.learning_rate (0.01, 0.5)": "optimizer.learning_rate=0.5",
    }.items():
        process = tiny_job.torchrun(*WHOLE, override)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        assert output.count("error: ") == 1 and words in output, output


def test_signal_saves_and_ends_cleanly_a_second_one_at_once(tiny_job: TinyJob) -> None:
    process = tiny_job.start(*tiny_job.command(*ENDLESS))
    tiny_job.wait_for_step(3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Traceback" not in output and "as asked" in output
    _assert_ends_with_a_checkpoint(tiny_job)

    process = tiny_job.start(*tiny_job.command(*ENDLESS))
    before = len(tiny_job.records())
    tiny_job.wait_for_step(before + 2, process)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3  # the launcher and two processes
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=150)
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
    assert not _left_behind()


def test_killed_command_lets_the_processes_save_and_the_next_start_cleans_up(tiny_job: TinyJob) -> None:
    process = tiny_job.start(*tiny_job.command(*ENDLESS))
    tiny_job.wait_for_step(3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    latest = tiny_job.folder / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + 60
    while not latest.exists():
        assert time.monotonic() < deadline, "no checkpoint after the command was killed"
        time.sleep(0.05)
    step = int(latest.read_text().strip().removeprefix("step_"))
    output = tiny_job.train(*ENDLESS, f"training.stop_after_step={step + 2}")
    assert f"step {step}" in output
    assert [int(row[0]) for row in _steps(tiny_job.records())] == list(range(1, step + 3))


def test_under_torchrun_with_a_signal(tiny_job: TinyJob) -> None:
    process = tiny_job.torchrun(*ENDLESS, "training.precision=bf16")
    tiny_job.wait_for_step(3, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on, waits for 30 s, and ends with an error of its own
    output, _ = process.communicate(timeout=150)
    assert "as asked" in output
    _assert_ends_with_a_checkpoint(tiny_job)


def test_under_the_deepspeed_launcher_with_a_signal(tiny_job: TinyJob, free_port: int) -> None:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators=2", f"--master_port={free_port}"]
    process = tiny_job.start(*launcher, *tiny_job.command(*ENDLESS)[1:])
    tiny_job.wait_for_step(3, process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C: runner, launcher and ranks get it, the ranks SIGTERM too
    output, _ = process.communicate(timeout=150)
    assert "as asked" in output, output
    _assert_ends_with_a_checkpoint(tiny_job)
