"""The temporary folder of one job, and what killed jobs left behind.

Unpacked shards, requests to stop and what libraries put into the temporary folder lie in a folder of the job's own. A
shared lock on a file in it, which the kernel frees when its holder dies, tells that it is in use; the next job removes
what dead ones left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SCRATCH_VARIABLE = "FWPKM_SCRATCH"
"""Environment variable with the job's folder, where the command that started the processes has made it."""
_PREFIX = "fwpkm-job-"
_NEW_PREFIX = "fwpkm-new-"
_NEW_SECONDS = 3600.0
"""Nobody takes that long to lock the folder just made."""
_LOCK = "in-use.lock"


@contextmanager
def open_scratch() -> Iterator[tuple[Path, int]]:
    """Make a job's temporary folder and remove it at the end; first remove those of jobs that were killed.

    Yields the folder and the descriptor of a lock that marks it as used: a process that holds the descriptor keeps
    the folder from being removed by others.
    """
    clean_abandoned()
    new = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX))
    with (new / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        # It gets its name with the lock: others that clean up take an unlocked folder of that name for abandoned.
        folder = new.with_name(_PREFIX + new.name.removeprefix(_NEW_PREFIX))
        new.rename(folder)
        try:
            yield folder, lock.fileno()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def hold_scratch(folder: Path) -> Iterator[None]:
    """Use a folder that another process has made: it stays as long as this one needs it, whoever dies."""
    with (folder / _LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def is_held_by_others(descriptor: int) -> bool:
    """Whether other processes hold a folder, given its maker's lock; if not, nobody can begin to."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # trying gave it up; the others' locks kept the folder
        return True
    return False


def use_as_temporary_folder(folder: Path) -> None:
    """Make this process and its children put temporary files there. Libraries take it at import."""
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)


def clean_abandoned() -> None:
    """Remove folders of this user's jobs that no longer run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (folder / _LOCK).open() as lock:
                if _is_free(lock):
                    shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            # A folder gets its name with the lock in it: this one is half removed, because something still wrote there.
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another user's
    for folder in Path(tempfile.gettempdir()).glob(f"{_NEW_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime > _NEW_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue


def _is_free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
