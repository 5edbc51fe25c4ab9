"""JSONL files, plain or compressed: one JSON object a line, its text in one field."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

from megatron_fwpkm.data.sources.base import Document, FieldFiles, Part, Piece, divide, group_pieces
from megatron_fwpkm.errors import UserError

_COMPRESSED = (".gz", ".zst")
_EXPANSION = 4
"""Bytes of text in a byte of a compressed file, about: only for grouping small files."""
_READ_BYTES = 1 << 16
_LARGEST_WINDOW = 1 << 31
"""Bytes: what `zstd --long=31` needs; the library's own limit refuses such files."""


class JsonLinesSource(FieldFiles):
    """JSONL files; a large plain one is divided at lines, a compressed one is one piece."""

    def __init__(self, path: str, pattern: str | None, text_field: str) -> None:
        super().__init__(path, pattern or "**/*.jsonl*", text_field)

    def parts(self, size: int) -> list[Part]:
        """Byte ranges of plain files, whole compressed ones; small ones together."""
        pieces: list[tuple[Piece, int]] = []
        for file in self._files:
            if file.name.endswith(_COMPRESSED):
                pieces.append((Piece(file.name, 0, file.size), file.size * _EXPANSION))
            else:
                pieces += [(Piece(file.name, *bounds), bounds[1] - bounds[0]) for bounds in divide(file.size, size)]
        return group_pieces(pieces, size)

    def read(self, piece: Piece) -> Iterator[Document]:
        """The documents of the lines that begin inside the piece's bytes (of a compressed file: all)."""
        path = Path(self._root, piece.name)
        with ExitStack() as opened:
            file = _open(path, opened)
            position = piece.begin
            end: int | None = piece.end
            if path.suffix in _COMPRESSED:
                end = None
            elif position > 0:
                file.seek(position - 1)
                position += len(file.readline()) - 1  # the rest of a line that began before, or just its line feed
            while end is None or position < end:
                line = self._next_line(file, path)
                if not line:
                    return
                if line.strip():
                    text = self._text(line, path, position)
                    if text:
                        yield Document.of(f"{piece.name}:{position}", text)
                position += len(line)

    def _next_line(self, file: IO[bytes], path: Path) -> bytes:
        import zlib

        import zstandard

        try:
            return file.readline()
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{path} is damaged: {error}; replace it or leave it out by data.files") from error

    def _text(self, line: bytes, path: Path, position: int) -> str:
        where = f"{path}, line at byte {position}"
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); data.source jsonl needs one object a line") from error
        if not isinstance(record, dict) or self._text_field not in record:
            names = ", ".join(map(str, record)) if isinstance(record, dict) else "none, it is no object"
            raise UserError(f"{where}: no field {self._text_field!r}; set data.text_field (fields here: {names})")
        text = record[self._text_field]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: field {self._text_field!r} holds {type(text).__name__}, not text")
        return text or ""


def _open(path: Path, opened: ExitStack) -> IO[bytes]:
    file: IO[bytes] = opened.enter_context(path.open("rb"))
    if path.suffix == ".gz":
        return cast(IO[bytes], opened.enter_context(gzip.open(file, "rb")))
    if path.suffix == ".zst":
        import zstandard

        stream = _ZstandardFrames(
            file, lambda: zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        )
        return cast(IO[bytes], opened.enter_context(io.BufferedReader(stream, _READ_BYTES)))
    return file


class _ZstandardFrames(io.RawIOBase):
    """The content of all frames of a file. Raises EOFError if the file ends inside one.

    The library's stream reader takes a cut file for a whole one.
    """

    def __init__(self, file: IO[bytes], new_frame: Callable[[], Any]) -> None:
        self._file = file
        self._new_frame = new_frame
        self._frame = new_frame()
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            packed = self._frame.unused_data if self._frame.eof else b""
            packed = packed or self._file.read(_READ_BYTES)
            if not packed:
                if not self._frame.eof:
                    raise EOFError("it is truncated: it ends inside a compressed frame")
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            self._content = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
