"""Corpora that need no download.

"stdlib" is the standard library of the Python that runs this program: its source files, which carry their own
documentation, and the text files beside them. They are real, long documents that every installation has.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_fwpkm.errors import UserError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_TEXT_ENDINGS = (".py", ".txt", ".rst")
_SMALLEST_CHARACTERS = 64


@dataclass(frozen=True)
class Document:
    """One text with a stable name and the hash of its content."""

    name: str
    text: str
    sha256: str


def read_documents(source: str, limit: int | None = None) -> list[Document]:
    """All documents of a source, ordered by name, without duplicates; `limit` keeps the first so many.

    Raises UserError if the source is unknown or has no documents.
    """
    if source != "stdlib":
        raise UserError(f"unknown data.source {source!r}; available: stdlib")
    documents: list[Document] = []
    seen: set[str] = set()
    for path, name in _library_files(Path(sysconfig.get_path("stdlib"))):
        text = _read_text(path)
        if text is None or len(text) < _SMALLEST_CHARACTERS:
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        documents.append(Document(name, text, digest))
        if limit is not None and len(documents) == limit:
            break
    if len(documents) < 2:
        raise UserError(
            f"the standard library at {sysconfig.get_path('stdlib')} has no readable source files; use a Python "
            f"installation that keeps them"
        )
    return documents


def source_version(source: str) -> str:
    """What a source's content depends on, as text that goes into the fingerprint of a preparation."""
    return f"{source}: {platform.python_implementation()} {platform.python_version()}"


def _library_files(root: Path) -> Iterator[tuple[Path, str]]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(_TEXT_ENDINGS):
                path = Path(folder, file)
                found.append((path.relative_to(root).as_posix(), path))
    for name, path in sorted(found):
        yield path, name


def _read_text(path: Path) -> str | None:
    """The file's text by its declared encoding, or None where it has none (the library's tests hold broken files)."""
    try:
        if path.suffix == ".py":
            with tokenize.open(path) as file:
                return file.read()
        return path.read_text(encoding="utf-8")
    except (OSError, SyntaxError, UnicodeError):
        return None
