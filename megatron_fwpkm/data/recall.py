"""Synthetic associative recall: pairs of key and value, filler, then questions that only a memory can answer.

    key value key value ... | filler filler ... | key value key value ...
    pairs                     filler              questions, each followed by its answer

Keys of a sequence are distinct and every question asks for another one, so an answer is never seen between its pair
and its question. Values are drawn independently, so nothing but the pair tells an answer: chance is 1 / values.

Shape legend: B batch, T tokens of a sequence, P pairs, Q questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from pydantic import Field, model_validator

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.section import Section

TRAINING, HELD_OUT, MEASUREMENT = range(3)
"""Streams of sequences that have nothing in common, although the seed is the same."""

FORMAT_VERSION = 1
"""Raised when the same settings begin to mean other sequences."""


class RecallConfig(Section):
    """Sequences of key-value pairs, filler and questions. Each kind of token has a vocabulary of its own."""

    pairs: int = Field(default=64, ge=1)
    """Pairs of a sequence; their keys are distinct."""
    questions: int = Field(default=64, ge=1)
    """Pairs that are asked for at the end, in random order; at most `pairs`."""
    keys: int = Field(default=1024, ge=1, le=1 << 20)
    """Tokens that may be keys; at least `pairs`."""
    values: int = Field(default=64, ge=2, le=1 << 20)
    """Tokens that may be values; guessing one is right once in so many times."""
    fillers: int = Field(default=64, ge=1, le=1 << 20)
    """Tokens that may be filler."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sequences."""

    @model_validator(mode="after")
    def _check(self) -> RecallConfig:
        if self.questions > self.pairs:
            raise ValueError(f"questions ({self.questions}) must be at most pairs ({self.pairs})")
        if self.pairs > self.keys:
            raise ValueError(
                f"pairs ({self.pairs}) must be at most keys ({self.keys}): keys of a sequence are distinct"
            )
        return self

    @property
    def vocab_size(self) -> int:
        """All tokens: values from 0, then fillers, then keys."""
        return self.values + self.fillers + self.keys

    def filler_tokens(self, sequence_length: int) -> int:
        """Tokens that pairs and questions leave of a sequence. Raises ValueError if they don't fit into it."""
        left = sequence_length - 2 * (self.pairs + self.questions)
        if left < 0:
            raise ValueError(
                f"{self.pairs} pairs and {self.questions} questions take {sequence_length - left} tokens and do not "
                f"fit into sequences of {sequence_length}"
            )
        return left


class RecallSequence:
    """One sequence in its parts, int64 arrays of token ids: pairs [2 P], filler, questions [2 Q]."""

    def __init__(self, config: RecallConfig, filler_tokens: int, stream: int, index: int) -> None:
        """Draw sequence number `index` of a stream: the same numbers always, whatever was drawn before."""
        random = numpy.random.default_rng([config.seed, stream, index])
        keys_P = config.values + config.fillers + random.choice(config.keys, config.pairs, replace=False)
        values_P = random.integers(config.values, size=config.pairs)
        asked_Q = random.permutation(config.pairs)[: config.questions]
        self.pairs = numpy.stack([keys_P, values_P], axis=1).reshape(-1)
        self.questions = numpy.stack([keys_P[asked_Q], values_P[asked_Q]], axis=1).reshape(-1)
        # Last, so that sequences of one number have the same pairs whatever the length of their filler.
        self.filler = config.values + random.integers(config.fillers, size=filler_tokens)


def draw_parts(
    config: RecallConfig, filler_tokens: int, stream: int, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences first .. first + count - 1 of a stream as (pairs and filler [B, 2 P + filler], questions [B, 2 Q])."""
    drawn = [RecallSequence(config, filler_tokens, stream, index) for index in range(first, first + count)]
    context_BT = numpy.stack([numpy.concatenate([one.pairs, one.filler]) for one in drawn])
    questions_BT = numpy.stack([one.questions for one in drawn])
    return torch.from_numpy(context_BT), torch.from_numpy(questions_BT)


def answer_labels(context_BT: torch.Tensor, questions_BT: torch.Tensor) -> torch.Tensor:
    """Labels of context and questions: at the key of a question its value, elsewhere IGNORED_LABEL."""
    labels_BT = torch.full_like(torch.cat([context_BT, questions_BT], dim=1), IGNORED_LABEL)
    labels_BT[:, context_BT.shape[1] :: 2] = questions_BT[:, 1::2]
    return labels_BT


class RecallLoader:
    """Endless microbatches of one stream; each replica has its own share of every global microbatch.

    The cursor counts sequences of all replicas together, so a job may go on with another number of them.
    """

    def __init__(
        self,
        config: RecallConfig,
        sequence_length: int,
        batch_size: int,
        stream: int = TRAINING,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        """Raises ValueError if the pairs and questions don't fit into `sequence_length` tokens."""
        self._config = config
        self._filler_tokens = config.filler_tokens(sequence_length)
        self._batch_size = batch_size
        self._stream = stream
        self._replica = replica
        self._replicas = replicas
        self._next_sequence = 0

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        first = self._next_sequence + self._replica * self._batch_size
        self._next_sequence += self._replicas * self._batch_size
        context_BT, questions_BT = draw_parts(self._config, self._filler_tokens, self._stream, first, self._batch_size)
        return TokenBatch(torch.cat([context_BT, questions_BT], dim=1), answer_labels(context_BT, questions_BT))

    def close(self) -> None:
        """Nothing runs beside."""

    def state_dict(self) -> dict[str, Any]:
        """Number of sequences that all replicas together have taken; the same on every rank."""
        return {"sequence": self._next_sequence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a cursor; the next batch starts there. Raises UserError if it is another loader's."""
        if not isinstance(state.get("sequence"), int):
            raise UserError(
                "the saved place in the data is not one of recall sequences; give the same data settings, or another "
                "run_directory to begin anew"
            )
        self._next_sequence = state["sequence"]
