"""Writing files so that a crash leaves either the old or the new content, never a half."""

from __future__ import annotations

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force everything below a folder, and the folder itself, to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_path(path)
    sync_path(folder)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)
