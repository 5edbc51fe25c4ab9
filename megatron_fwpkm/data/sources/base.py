"""What sources have in common: documents, parts, and finding and grouping files."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import is_no_space


@dataclass(frozen=True)
class Document:
    """One text with a stable name and the hash of its content."""

    name: str
    text: str
    sha256: str

    @classmethod
    def of(cls, name: str, text: str) -> Document:
        """The document with this text. Unpaired surrogates, which JSON can hold and UTF-8 can't, are replaced."""
        try:
            content = text.encode()
        except UnicodeEncodeError:
            content = text.encode("utf-8", "replace")
            text = content.decode()
        return cls(name, text, hashlib.sha256(content).hexdigest())


class Piece(NamedTuple):
    """A range of one file or table: bytes, row groups or rows `begin` to `end`, as its source counts."""

    name: str
    begin: int
    end: int


Part = tuple[Piece, ...]
"""What one process prepares at a time. Parts depend on the source and their size alone."""


class Source(Protocol):
    """A source; it is sent to other processes, so it holds settings and lists, never open files."""

    def version(self) -> str:
        """Text that changes whenever the content may have changed."""

    def parts(self, size: int) -> list[Part]:
        """Divide the source into parts of about `size` bytes of text, in a fixed order."""

    def read(self, piece: Piece) -> Iterator[Document]:
        """The documents of a piece, in a fixed order; empty ones are left out. Raises UserError if unreadable."""


class SourceFile(NamedTuple):
    """A file of a source."""

    name: str
    """Path below the source's folder."""
    path: str
    size: int
    """Bytes."""
    changed: int
    """Time of the last change, in nanoseconds."""


def list_files(path: str, pattern: str) -> list[SourceFile]:
    """The file `path`, the files matching it where it is a glob, or those matching `pattern` below the folder `path`.

    Ordered by name. Raises UserError if there is none.
    """
    if Path(path).is_dir():
        root, found = Path(path), _files_below(Path(path), pattern)
    elif Path(path).is_file():
        root, found = Path(path).parent, [Path(path)]
    elif glob.has_magic(path):
        first_magic = next(index for index, part in enumerate(Path(path).parts) if glob.has_magic(part))
        root, found = Path(*Path(path).parts[:first_magic]), sorted(map(Path, glob.glob(path, recursive=True)))
    else:
        raise UserError(f"there is no {path}; give an existing folder, file or glob as data.path")
    files = [_describe(file, root) for file in found if file.is_file()]
    if not files:
        within = f"no file in {path} matches data.files {pattern!r}" if Path(path).is_dir() else f"no file is {path}"
        raise UserError(f"{within}; give data.path and data.files that match the text files")
    return files


def _files_below(root: Path, pattern: str) -> list[Path]:
    """What matches a pattern below a folder, in linked folders too: pathlib's `**` leaves those out."""
    if not pattern.startswith("**/"):
        return sorted(map(Path, glob.glob(str(Path(glob.escape(str(root)), pattern)), recursive=True)))
    found: set[Path] = set()
    seen: set[Path] = set()
    waiting = [root]
    while waiting:  # the folder itself, then those that links lead to and that are not inside it already
        top = waiting.pop(0)
        if top.resolve() in seen:
            continue
        found.update(top.glob(pattern))
        links: list[Path] = []
        for folder, subfolders, _ in os.walk(top):
            seen.add(Path(folder).resolve())
            links += [path for path in (Path(folder, name) for name in subfolders) if path.is_symlink()]
        waiting += sorted(links)
    return sorted(found)


def _describe(path: Path, root: Path) -> SourceFile:
    status = path.stat()
    return SourceFile(path.relative_to(root).as_posix(), str(path.absolute()), status.st_size, status.st_mtime_ns)


def files_version(files: Sequence[SourceFile]) -> str:
    """Hash over names, sizes and times of change."""
    listing = "\n".join(f"{file.name}\t{file.size}\t{file.changed}" for file in files)
    return f"{len(files)} files {hashlib.sha256(listing.encode()).hexdigest()}"


class FieldFiles:
    """Files of which one field or column holds the texts: what a source of such files keeps."""

    def __init__(self, path: str, pattern: str, text_field: str) -> None:
        self._files = list_files(path, pattern)
        self._root = self._files[0].path.removesuffix(self._files[0].name)
        self._text_field = text_field

    def version(self) -> str:
        """Names, sizes and times of change of the files, and the field."""
        return f"{files_version(self._files)}, {self._text_field}"


def group_pieces(pieces: Iterable[tuple[Piece, int]], size: int) -> list[Part]:
    """Join consecutive pieces, each given with its bytes, into parts of at most `size` bytes (or one larger piece)."""
    parts: list[Part] = []
    current: list[Piece] = []
    current_size = 0
    for piece, piece_size in pieces:
        if current and current_size + piece_size > size:
            parts.append(tuple(current))
            current, current_size = [], 0
        current.append(piece)
        current_size += piece_size
    return [*parts, tuple(current)] if current else parts


def divide(end: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `step` that cover 0..end."""
    bounds = [*range(0, end, max(1, step)), end]
    return itertools.pairwise(bounds)


def mixed(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Files ordered by the hash of their names, so that each part is a sample of the whole, not one subfolder."""
    return sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())


def read_documents(source: Source, part: Part) -> Iterator[Document]:
    """All documents of a part. Raises UserError if a file of the source can't be read."""
    for piece in part:
        with naming_source(piece.name):
            yield from source.read(piece)


@contextmanager
def naming_source(name: str) -> Iterator[None]:
    """Turn an OSError of reading `name` into a UserError that names the source, unless it is about a full disk."""
    try:
        yield
    except OSError as error:
        if is_no_space(error):
            raise  # a cache that the source writes
        raise UserError(
            f"cannot read {error.filename or name} of the source: {error.strerror or error}; make it readable, or "
            f"leave it out by data.path and data.files"
        ) from error
