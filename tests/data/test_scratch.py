"""The job's temporary folder and the removal of what dead jobs left."""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path

import pytest

from megatron_fwpkm.data import scratch


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: temporary folder and shared memory."""
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    return tmp_path


def _segments(machine: Path, number: int, folder: str) -> list[Path]:
    text = f"{folder}\0{number}".encode()
    locals_file = machine / "shm" / f"{number:06}_locals"
    locals_file.write_bytes(struct.pack("<i", 4 + len(text)) + text)
    barrier = machine / "shm" / f"{number:06}_barrier"
    barrier.write_bytes(b"x")
    return [locals_file, barrier]


def test_scratch_is_removed_at_the_end(machine: Path) -> None:
    with scratch.open_scratch() as (folder, _):
        assert folder.is_dir()
        (folder / "file").write_text("x")
        own = _segments(machine, 0, f"{folder}/train")
    assert not folder.exists()
    scratch.clean_abandoned()
    assert not any(path.exists() for path in own)


def test_only_dead_jobs_are_cleaned(machine: Path) -> None:
    dead, living = machine / "fwpkm-job-dead", machine / "fwpkm-job-living"
    for folder in (dead, living):
        folder.mkdir()
        (folder / "in-use.lock").touch()
    of_dead = _segments(machine, 0, f"{dead}/train")
    of_living = _segments(machine, 1, f"{living}/train")
    of_others = _segments(machine, 2, "/somewhere/else")
    (machine / "shm" / "000003_locals").write_bytes(b"")
    with (living / "in-use.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch.clean_abandoned()
    assert not dead.exists() and living.exists()
    assert not any(path.exists() for path in of_dead)
    assert all(path.exists() for path in [*of_living, *of_others])
