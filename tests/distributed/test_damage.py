"""Jobs that meet damage: flipped bytes, full disks, other jobs, killed launchers, diverged memories."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed
FAULTY = str(Path(__file__).parent / "workers" / "faulty_job.py")
# Few lines: nobody reads the pipe while the job runs.
ENDLESS = ("training.steps=100000", "checkpoint.every=100000", "logging.every=100000")
WHOLE = ("training.steps=24", "checkpoint.every=4", "checkpoint.keep_last_k=6")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def _refused(job: TinyJob, words: str, *overrides: str) -> str:
    output = job.train(*overrides, expected=2)
    assert output.count("error: ") == 1 and words in output and "Traceback" not in output, output
    return output


def test_damaged_checkpoints_are_set_aside_and_older_ones_serve(tiny_job: TinyJob, whole_run: TinyJob) -> None:
    checkpoints = tiny_job.begin_from(whole_run, 20, 24)
    same = (*WHOLE, "checkpoint.keep_last_k=1")
    older, newest = checkpoints / "step_00000020", checkpoints / "step_00000024"
    weights = Path("tensors", "__1_0.distcp")
    _flip(newest / weights)
    (older / "job.json").rename(checkpoints / "kept")
    (checkpoints / ".step_00000028.partial").mkdir()  # killed while saving
    message = _refused(tiny_job, "no checkpoint in", *same)
    assert f"step_00000024 (the content of {weights} doesn't match its hash)" in message
    assert "step_00000020 (job.json is missing)" in message

    (checkpoints / "kept").rename(older / "job.json")
    (checkpoints / "latest").unlink()  # killed between the rename and the pointer: the newest whole one counts
    output = tiny_job.train(*same)
    assert f"checkpoint step_00000024 is damaged (the content of {weights} doesn't match its hash)" in output
    assert "renamed to damaged_step_00000024, going on from step_00000020" in output
    names = ["damaged_step_00000024", "latest", "step_00000024"]  # of whole ones the newest is kept, as asked
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    losses = [record.get("train/loss") for record in whole_run.records()]
    assert [record.get("train/loss") for record in tiny_job.records()] == losses


def _fill(disk: Path, leave: int) -> Path:
    """Leave so many bytes of a disk, up to what others write meanwhile."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while (free := shutil.disk_usage(disk).free) > leave:
            file.write(b"x" * (free - leave))
    return filler


def test_full_disk_ends_the_job_and_freed_it_goes_on(tiny_job: TinyJob, whole_run: TinyJob, small_disk: Path) -> None:
    here = f"run_directory={small_disk / 'run'}"
    checkpoints = tiny_job.begin_from(whole_run, 4, folder=small_disk / "run")

    # Full while the files are written, beside training, on the ranks that come last: the others must not wait for them.
    filler = _fill(small_disk, leave=300_000)
    process = tiny_job.start(sys.executable, FAULTY, str(tiny_job.config), "no-estimate", *WHOLE, here)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    assert output.count("error: ") == 1 and "no space left on the disk while writing a checkpoint" in output, output
    assert "Traceback" not in output
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000004"]

    # Full while a job runs: metrics, logs or the next checkpoint meet it first.
    filler.unlink()
    log = small_disk / "run" / "logs" / "train.log"
    before = log.read_text().count("step 5/24")
    process = tiny_job.start(*tiny_job.command("training.steps=24", "checkpoint.every=1000", here))
    while log.read_text().count("step 5/24") == before:
        assert process.poll() is None
    filler = _fill(small_disk, leave=0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert output.count("error: ") == 1 and "no space left" in output and "Traceback" not in output, output
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000004"]

    filler.unlink()
    output = tiny_job.train(*WHOLE, here)
    assert "step 4" in output
    losses = [record.get("train/loss") for record in whole_run.records()]
    lines = (small_disk / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("train/loss") for line in lines] == losses


def test_damaged_shard_is_found_before_anything_starts(tiny_job: TinyJob, whole_run: TinyJob, tiny_data: Path) -> None:
    data = tiny_job.folder / "data"
    shutil.copytree(tiny_data, data)
    shard = next(data.glob("*/validation/*/shard.00000.mds.zstd"))
    _flip(shard)
    _refused(tiny_job, f"{shard} is damaged", f"data.directory={data}")


def test_second_job_on_a_run_directory_is_refused_and_orphans_end(tiny_job: TinyJob) -> None:
    first = tiny_job.start(*tiny_job.command(*ENDLESS))
    tiny_job.wait_for_step(1, first)
    _refused(tiny_job, "another job is running", *ENDLESS)
    assert first.poll() is None
    (launcher,) = psutil.Process(first.pid).children()
    workers = launcher.children()
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()  # in the middle of a step: what they still need must be there when they go on
    os.kill(launcher.pid, signal.SIGKILL)
    assert first.stdout is not None
    assert any("the launcher of the processes is gone" in line for line in first.stdout)
    for worker in workers:
        worker.resume()
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
