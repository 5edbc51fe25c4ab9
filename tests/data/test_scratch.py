"""The job's temporary folder and the removal of what dead jobs left."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

import pytest

from megatron_fwpkm.data import scratch


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: a temporary folder."""
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_scratch_is_removed_at_the_end(machine: Path) -> None:
    with scratch.open_scratch() as (folder, _):
        assert folder.is_dir()
        (folder / "file").write_text("x")
        scratch.clean_abandoned()
        assert folder.is_dir()
    assert not folder.exists()


def test_a_folder_is_kept_for_those_that_hold_it(machine: Path) -> None:
    with scratch.open_scratch() as (folder, lock):
        with scratch.hold_scratch(folder):
            assert scratch.is_held_by_others(lock)
            scratch.clean_abandoned()
            assert scratch.is_held_by_others(lock) and folder.is_dir()
        assert not scratch.is_held_by_others(lock)
    assert not folder.exists()


def test_a_folder_outlives_its_killed_maker_while_held(machine: Path) -> None:
    folder = machine / "fwpkm-job-orphaned"
    folder.mkdir()
    (folder / "in-use.lock").touch()
    with scratch.hold_scratch(folder):
        scratch.clean_abandoned()
        assert folder.is_dir()
    scratch.clean_abandoned()
    assert not folder.exists()


def test_only_dead_jobs_are_cleaned(machine: Path) -> None:
    dead, living = machine / "fwpkm-job-dead", machine / "fwpkm-job-living"
    for folder in (dead, living):
        folder.mkdir()
        (folder / "in-use.lock").touch()
    with (living / "in-use.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        scratch.clean_abandoned()
    assert not dead.exists() and living.exists()


def test_a_half_removed_folder_is_cleaned(machine: Path) -> None:
    """A process that still wrote into it may have kept its removal from ending, after the lock's file was gone."""
    (machine / "fwpkm-job-half" / "shards").mkdir(parents=True)
    scratch.clean_abandoned()
    assert not list(machine.iterdir())


def test_a_folder_just_being_made_is_not_cleaned(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job cleans up between the making of the lock's file and the locking."""
    lock = fcntl.flock
    cleaned: list[bool] = []

    def flock(file: IO[str], operation: int) -> None:
        if operation == fcntl.LOCK_SH:
            scratch.clean_abandoned()
            cleaned.append(True)
        lock(file, operation)

    monkeypatch.setattr(scratch.fcntl, "flock", flock)
    with scratch.open_scratch() as (folder, _):
        assert cleaned and folder.is_dir() and folder.name.startswith("fwpkm-job-")
        scratch.clean_abandoned()
        assert (folder / "in-use.lock").exists()
    assert not list(machine.iterdir())


def test_folders_that_were_never_finished_are_cleaned_later(machine: Path) -> None:
    new, old = machine / "fwpkm-new-now", machine / "fwpkm-new-long-ago"
    for folder in (new, old):
        folder.mkdir()
        (folder / "in-use.lock").touch()
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    scratch.clean_abandoned()
    assert new.exists() and not old.exists()
