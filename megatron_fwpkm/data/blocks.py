"""What shards hold: the token stream of one part and split, cut into blocks of equal length.

A stream is its documents' tokens one after the other, each document closed by its end token. A record of a shard has

    tokens            block_tokens tokens (the last block of a stream may be shorter), smallest unsigned type
    starts            uint32: places in the block where a document begins, closed by the length of the block
    first_document    int64: number, within the stream, of the document that the first token belongs to
    first_position    int64: place of the first token in that document

so that documents and positions of any stretch are found from its blocks alone, and one corpus serves any length.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_fwpkm.compatibility import mend_torchvision

SHARD_HASHES = ("sha1", "xxh64")
"""Hashes of each shard; in sorted order."""
INDEX_FILE = "index.json"


def import_streaming() -> Any:
    """mosaicml-streaming, which imports transformers and with it torchvision."""
    mend_torchvision()
    import streaming

    return streaming


def smallest_dtype(vocab_size: int) -> str:
    """Name of the smallest unsigned integer type that holds every token id."""
    for bits in (8, 16, 32):
        if vocab_size <= 1 << bits:
            return f"uint{bits}"
    return "uint64"


@dataclass(frozen=True)
class StreamCounts:
    """Size of one written stream, and the entries of its shards for an index."""

    documents: int
    tokens: int
    shards: list[dict[str, Any]]


class BlockWriter:
    """Writes one stream, document by document, into the shards of a folder that it makes."""

    def __init__(self, folder: Path, dtype: str, block_tokens: int, shard_bytes: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._block_tokens = block_tokens
        self._writer = import_streaming().MDSWriter(
            out=str(folder),
            columns={
                "tokens": f"ndarray:{dtype}",
                "starts": "ndarray:uint32",
                "first_document": "int",
                "first_position": "int",
            },
            compression="zstd",
            hashes=list(SHARD_HASHES),
            size_limit=shard_bytes,
        )
        self._waiting: list[numpy.ndarray] = []
        self._waiting_tokens = 0
        self._written_tokens = 0
        self._documents = 0
        self._starts = numpy.empty(0, numpy.int64)
        """Places in the stream where documents begin, from the one that holds the first waiting token."""
        self._new_starts: list[int] = []

    def add(self, tokens: numpy.ndarray) -> None:
        """Append one document, its end token included."""
        self._new_starts.append(self._written_tokens + self._waiting_tokens)
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        self._documents += 1
        if self._waiting_tokens >= 16 * self._block_tokens:
            self._write(self._waiting_tokens // self._block_tokens * self._block_tokens)

    def finish(self) -> StreamCounts:
        """Write what is left and close; the folder is gone if the stream is empty."""
        self._write(self._waiting_tokens)
        self._writer.finish()
        index = self._folder / INDEX_FILE
        shards = json.loads(index.read_text())["shards"]
        index.unlink()  # one index covers all parts of a split
        if not shards:
            shutil.rmtree(self._folder)
        return StreamCounts(self._documents, self._written_tokens, shards)

    def _write(self, count: int) -> None:
        """Write the first `count` waiting tokens as blocks."""
        if not count:
            return
        waiting = numpy.concatenate(self._waiting).astype(self._dtype, copy=False)
        starts = numpy.concatenate([self._starts, numpy.array(self._new_starts, numpy.int64)])
        first_known = self._documents - len(starts)
        begin = self._written_tokens
        for offset in range(0, count, self._block_tokens):
            block = waiting[offset : min(offset + self._block_tokens, count)]
            first, end = begin + offset, begin + offset + len(block)
            current = int(numpy.searchsorted(starts, first, side="right")) - 1
            inside = starts[numpy.searchsorted(starts, first) : numpy.searchsorted(starts, end)] - first
            self._writer.write(
                {
                    "tokens": block,
                    "starts": numpy.append(inside, len(block)).astype(numpy.uint32),
                    "first_document": first_known + current,
                    "first_position": int(first - starts[current]),
                }
            )
        self._written_tokens += count
        self._waiting = [waiting[count:].copy()]
        self._waiting_tokens -= count
        # An end of text may be the end of a document too: then the next one begins here and is not known yet.
        self._starts = starts[max(0, int(numpy.searchsorted(starts, self._written_tokens, side="right")) - 1) :]
        self._new_starts = []
