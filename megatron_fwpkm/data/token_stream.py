"""A split as one long stream of tokens: any stretch of it, with documents and positions."""

from __future__ import annotations

import functools
import hashlib
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy

from megatron_fwpkm.data.blocks import INDEX_FILE
from megatron_fwpkm.data.manifest import Manifest, read_manifest
from megatron_fwpkm.data.scratch import open_scratch
from megatron_fwpkm.data.shards import ShardCache
from megatron_fwpkm.errors import UserError

DEFAULT_OPEN_SHARDS = 16


class StreamSlice(NamedTuple):
    """Consecutive tokens of a split."""

    tokens: numpy.ndarray
    """The type that the corpus stores."""
    documents: numpy.ndarray
    """int64: number, within the split, of the document that each token belongs to; its end token belongs to it too."""
    positions: numpy.ndarray
    """int64: place of each token in its document."""


class TokenStream:
    """The token stream of one split of a prepared corpus: its parts' streams one after the other.

    `cache` gets the unpacked shards (a folder of this corpus and split in it); None means a temporary folder, removed
    at the end. A place is found in O(log parts).
    """

    def __init__(
        self,
        corpus: Path,
        manifest: Manifest,
        split: str,
        cache: Path | None = None,
        open_shards: int = DEFAULT_OPEN_SHARDS,
        limit_bytes: int = 1 << 62,
    ) -> None:
        counts = manifest.split(split)
        self.tokens = counts.tokens
        self.documents = counts.documents
        self._dtype = manifest.token_dtype
        self._block_tokens = manifest.block_tokens
        part_tokens = numpy.array(counts.part_tokens, numpy.int64)
        self._first_tokens = _sums(part_tokens)
        self._first_documents = _sums(numpy.array(counts.part_documents, numpy.int64))
        self._first_blocks = _sums(-(-part_tokens // self._block_tokens))
        if cache is None:
            opened = ExitStack()
            cache, _ = opened.enter_context(open_scratch())
            self.close = weakref.finalize(self, opened.close)
        folder = cache / f"{manifest.fingerprint}-{_hash_of_shards(corpus / split)}" / split
        self._shards = ShardCache(corpus / split, folder, open_shards, limit_bytes)

    def read_tokens(self, start: int, count: int) -> numpy.ndarray:
        """`count` tokens from place `start` of the stream."""
        return self._read(start, count, boundaries=False).tokens

    def read(self, start: int, count: int) -> StreamSlice:
        """`count` tokens from place `start` of the stream, with their documents and positions."""
        return self._read(start, count, boundaries=True)

    def _read(self, start: int, count: int, boundaries: bool) -> StreamSlice:
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.tokens}")
        tokens = numpy.empty(count, self._dtype)
        documents, positions = (numpy.empty(count if boundaries else 0, numpy.int64) for _ in range(2))
        filled = 0
        while filled < count:
            part = int(numpy.searchsorted(self._first_tokens, start + filled, side="right")) - 1
            number, inside = divmod(start + filled - int(self._first_tokens[part]), self._block_tokens)
            block = self._shards.block(int(self._first_blocks[part]) + number)
            taken = block["tokens"][inside : inside + count - filled]
            target = slice(filled, filled + len(taken))
            tokens[target] = taken
            if boundaries:
                places = numpy.arange(inside, inside + len(taken))
                starts = block["starts"][:-1].astype(numpy.int64)
                starts = starts[starts > 0]  # the first token's document is told apart
                before = numpy.searchsorted(starts, places, side="right")
                origins = numpy.concatenate([[-block["first_position"]], starts])
                documents[target] = int(self._first_documents[part]) + block["first_document"] + before
                positions[target] = places - origins[before]
            filled += len(taken)
        return StreamSlice(tokens, documents, positions)


def read_stream(corpus: Path, split: str, start_token: int, count: int) -> StreamSlice:
    """`count` consecutive tokens of a split from place `start_token`, with their documents and positions.

    A document's tokens are those with its number; it begins where the position is 0 and ends with the corpus's end
    token. The first and the last document of a slice may be cut: read from place 0 for whole ones. Raises UserError
    if the corpus or the split is not there or damaged, IndexError beyond the end (stream_tokens() tells where that is).
    """
    return _opened(corpus.resolve(), split).read(start_token, count)


def stream_tokens(corpus: Path, split: str) -> int:
    """Number of tokens in a split. Raises UserError as read_stream() does."""
    return _opened(corpus.resolve(), split).tokens


@functools.lru_cache(maxsize=4)
def _opened(corpus: Path, split: str) -> TokenStream:
    return TokenStream(corpus, read_manifest(corpus), split)


def _hash_of_shards(folder: Path) -> str:
    """Hash of a split's index, which has those of its shards: so a cache never serves the tokens of another corpus."""
    try:
        return hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"cannot read {folder / INDEX_FILE}: {error.strerror}; give an intact corpus") from error


def _sums(counts: numpy.ndarray) -> numpy.ndarray:
    """What comes before each entry."""
    return numpy.concatenate([[0], numpy.cumsum(counts)[:-1]]).astype(numpy.int64)
