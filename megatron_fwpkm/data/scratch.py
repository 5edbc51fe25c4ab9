"""The temporary folder of one job, and what killed jobs left behind.

mosaicml-streaming keeps file locks in the temporary folder and cursors in shared memory, both under names that a
killed job's successor would reuse. A fresh folder per job avoids the first; segments whose job is dead are removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SCRATCH_VARIABLE = "FWPKM_SCRATCH"
"""Environment variable with the job's folder, where the command that started the processes has made it."""
_PREFIX = "fwpkm-job-"
_LOCK = "in-use.lock"
_SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def open_scratch() -> Iterator[tuple[Path, int]]:
    """Make a job's temporary folder and remove it at the end; first remove those of jobs that were killed.

    Yields the folder and the descriptor of a lock that marks it as used: a process that holds the descriptor keeps
    the folder from being removed by others. Shared memory is freed by the processes themselves when they end; after
    processes that may have been killed, call clean_abandoned().
    """
    clean_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder, lock.fileno()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def use_as_temporary_folder(folder: Path) -> None:
    """Make this process and its children put temporary files there. Call before streaming is imported."""
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)


def clean_abandoned() -> None:
    """Remove folders and shared memory of this user's jobs that no longer run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (folder / _LOCK).open() as lock:
                if _is_free(lock):
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another user's, or just being made or removed
    _clean_segments()


def _is_free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clean_segments() -> None:
    """Remove streaming's segments that name a job folder which is gone."""
    for segment in _SHARED_MEMORY.glob("[0-9]*_locals"):
        try:
            content = segment.read_bytes()
            # Layout: int32 size, then folders and the number of the segment, separated by NUL.
            folders = content[4 : int.from_bytes(content[:4], "little")].decode().split("\0")[:-1]
            if folders and all(_is_gone(folder) for folder in folders):
                for part in _SHARED_MEMORY.glob(f"{segment.name.split('_')[0]}_*"):
                    part.unlink(missing_ok=True)
        except (OSError, UnicodeError):
            continue


def _is_gone(folder: str) -> bool:
    for parent in Path(folder).parents:
        if parent.name.startswith(_PREFIX):
            return not parent.exists()
    return False
