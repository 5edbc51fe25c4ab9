"""Held-out text as measurements read it: one long stream, cut into sequences in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatron_fwpkm.config import TrainConfig


class TextCodec:
    """A tokenizer as measurements use it: no special tokens are added or hidden."""

    def __init__(self, tokenizer: Tokenizer, end_of_document: int) -> None:
        self._tokenizer = tokenizer
        self.end_of_document = end_of_document
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def spelling(self, token: int) -> str:
        """A token as the vocabulary spells it; empty for a number that has none."""
        return self._tokenizer.id_to_token(token) or ""


@dataclass(frozen=True)
class HeldOutText:
    """The beginning of a split."""

    codec: TextCodec
    tokens: NDArray[numpy.int64]
    documents: NDArray[numpy.int64]
    """Number of each token's document, from 0; the token that ends a document belongs to it."""
    separate: bool
    """Whether training kept the documents of a sequence apart."""

    def as_one(self) -> NDArray[numpy.int64]:
        """The tokens as one text, without those that end documents."""
        return self.tokens[self.tokens != self.codec.end_of_document]

    def sequences(self, count: int, length: int) -> list[TokenBatch]:
        """The first `count` sequences of `length` tokens, fewer where the text ends, one a batch, with documents.

        Consecutive ones share no input. Where documents are kept apart, positions start anew in each, and the last
        token of a document has no label. Raises UserError if there is not one.
        """
        count = min(count, (len(self.tokens) - 1) // length)
        if count < 1:
            raise UserError(
                f"the held-out split has {len(self.tokens):,} tokens, fewer than one sequence of {length}; raise "
                "data.validation_fraction (or data.test_fraction), or lower data.sequence_length"
            )
        return [self._sequence(index * length, length) for index in range(count)]

    def _sequence(self, start: int, length: int) -> TokenBatch:
        def cut(values: NDArray[Any], shift: int = 0) -> torch.Tensor:
            return torch.from_numpy(values[start + shift : start + shift + length].copy()).unsqueeze(0)

        tokens, labels = cut(self.tokens), cut(self.tokens, 1)
        documents, next_documents = cut(self.documents), cut(self.documents, 1)
        positions = None
        if self.separate:
            labels = labels.masked_fill(documents != next_documents, IGNORED_LABEL)
            index = torch.arange(length)
            starts = torch.ones_like(documents, dtype=torch.bool)
            starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
            positions = index - torch.where(starts, index, 0).cummax(1).values
        return TokenBatch(tokens, labels, documents, positions)


def open_held_out(config: TrainConfig, needed_tokens: int, trained_on: Mapping[str, str]) -> HeldOutText:
    """The beginning of the split that the evaluation reads: all of it, but no more than `needed_tokens`.

    The corpus is that with the hashes `trained_on`, in data.corpus or anywhere in data.directory; the source that it
    was prepared from is not needed. Raises UserError if it is not there or damaged.
    """
    from megatron_fwpkm.data.corpus import corpus_tokenizer, find_corpus
    from megatron_fwpkm.data.token_stream import read_stream

    if str(config.data.source) == "recall":
        raise UserError("a recall run has no held-out text; measure it with launch/recall.py")
    split = config.evaluation.split
    corpus, manifest = find_corpus(config.data, trained_on)
    found = read_stream(corpus, split, 0, min(manifest.split(split).tokens, needed_tokens))
    tokenizer = corpus_tokenizer(corpus)
    return HeldOutText(
        TextCodec(tokenizer.tokenizer, tokenizer.end_id),
        found.tokens.astype(numpy.int64),
        found.documents,
        config.data.documents == "separate",
    )
