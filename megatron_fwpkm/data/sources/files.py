"""Documents that are whole files: the standard library and folders of text files.

"stdlib" is the standard library of the Python that runs this program: its source files, which carry their own
documentation, and the text files beside them. They are real, long documents that every installation has.
"""

from __future__ import annotations

import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_fwpkm.data.sources.base import (
    Document,
    Part,
    Piece,
    SourceFile,
    files_version,
    group_pieces,
    list_files,
    mixed,
)
from megatron_fwpkm.errors import UserError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_TEXT_ENDINGS = (".py", ".txt", ".rst")
_SMALLEST_CHARACTERS = 64


class StandardLibrarySource:
    """The library source and documentation of the installed Python."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        self._files = _library_files(self._root)
        if not self._files:
            raise UserError(
                f"the standard library at {self._root} has no readable source files; use a Python installation that "
                f"keeps them"
            )

    def version(self) -> str:
        """Kind and version of the Python, and the names and sizes of its files."""
        files = [file._replace(changed=0) for file in self._files]
        return f"{platform.python_implementation()} {platform.python_version()}, {files_version(files)}"

    def parts(self, size: int) -> list[Part]:
        """Groups of files."""
        return _group_files(self._files, size)

    def read(self, piece: Piece) -> Iterator[Document]:
        """The file's text by its declared encoding; broken files, which the library's tests hold, have none."""
        path = self._root / piece.name
        try:
            if path.suffix == ".py":
                with tokenize.open(path) as file:
                    text = file.read()
            else:
                text = path.read_text(encoding="utf-8")
        except (OSError, SyntaxError, UnicodeError):
            return
        if len(text) >= _SMALLEST_CHARACTERS:
            yield Document.of(piece.name, text)


class FolderSource:
    """Text files (UTF-8), one document each."""

    def __init__(self, path: str, pattern: str | None) -> None:
        self._files = list_files(path, pattern or "**/*.txt")
        self._root = self._files[0].path.removesuffix(self._files[0].name)

    def version(self) -> str:
        """Names, sizes and times of change of the files."""
        return files_version(self._files)

    def parts(self, size: int) -> list[Part]:
        """Groups of files."""
        return _group_files(self._files, size)

    def read(self, piece: Piece) -> Iterator[Document]:
        """The file's text."""
        path = Path(self._root, piece.name)
        try:
            text = path.read_bytes().decode("utf-8-sig")  # line ends as they are
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it, or leave it out by "
                f"data.files"
            ) from error
        if text:
            yield Document.of(piece.name, text)


def _group_files(files: Sequence[SourceFile], size: int) -> list[Part]:
    return group_pieces(((Piece(file.name, 0, file.size), file.size) for file in mixed(files)), size)


def _library_files(root: Path) -> list[SourceFile]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for file in files:
            path = Path(folder, file)
            if file.endswith(_TEXT_ENDINGS) and path.is_file():
                found.append(SourceFile(path.relative_to(root).as_posix(), str(path), path.stat().st_size, 0))
    return sorted(found)
