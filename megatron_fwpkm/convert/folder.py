"""A folder that is written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import is_no_space, sync_path, sync_tree


def check_new_folder(target: Path) -> None:
    """Raise UserError if something is there already."""
    if target.is_symlink():
        raise UserError(f"{target} is a link; give the folder itself")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and not empty; give another folder to write to, or delete it")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end of the context and is removed if that fails.

    Raises UserError if something is at the target already, another process is writing it, or it can't be written.
    """
    check_new_folder(target)
    before = signal.signal(signal.SIGTERM, _end) if threading.current_thread() is threading.main_thread() else None
    partial = target.with_name(f".{target.name}.partial")
    lock, is_begun = None, False
    try:
        lock = _take(partial, target)
        is_begun = True
        check_new_folder(target)  # another process may have finished meanwhile
        yield partial
        sync_tree(partial)
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
        is_begun = False  # what has that name from here on is somebody else's
        sync_path(target.parent)
    except OSError as error:
        if is_no_space(error):
            raise UserError(
                f"no space left on the disk of {target}: nothing was written; free some, start again"
            ) from error
        raise UserError(f"cannot write {target}: {error.strerror or error}; give another folder") from error
    finally:
        if is_begun:
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _take(partial: Path, target: Path) -> int:
    """Make the folder anew, for this process alone as long as the descriptor that is returned is open."""
    if partial.is_symlink():
        raise UserError(f"{partial} is a link; delete it, or give another folder")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another one may have had it a moment ago, and have finished.
            is_here = os.path.lexists(partial) and os.path.samestat(os.fstat(descriptor), os.lstat(partial))
        except BlockingIOError:
            is_here = False
        if not is_here:
            raise UserError(f"another process is writing {target}; wait for it, or give another folder")
        for left in partial.iterdir():  # by one that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _end(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does: what was begun is removed on the way out."""
    raise SystemExit(128 + number)
