"""Reading haystacks again and again, then answering: the model side of the needle measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy
import torch

from megatron_fwpkm.evaluate.needles import NeedlePrompt
from megatron_fwpkm.model.decoder import Decoder

Protocol = Literal["aligned", "official"]
TOKENS_PER_CALL = 512
"""Tokens that one call reads where the cut does not matter: logits of a whole context would fill the memory."""


class Reader:
    """Answers batches of prompts, every batch of `batch` samples, after a number of readings.

    aligned: each sample has its own memory, which starts as trained; chunks are the trained ones, and a reading ends
    with the write of its last, short chunk.
    official (the paper's code): one memory for all samples, carried from batch to batch, and each call is one chunk, a
    reading as well as a token of an answer; the model must have been built with chunk_size "sequence".
    """

    def __init__(self, model: Decoder, protocol: Protocol, batch: int, vocab_size: int) -> None:
        self._model, self._protocol, self._batch, self._vocab_size = model, protocol, batch, vocab_size
        self._device = next(model.parameters()).device
        self._carried: Any = self._make_cache(batch) if protocol == "official" else None

    def answer(self, prompts: Sequence[NeedlePrompt], readings: int) -> list[list[int]]:
        """Greedy answers, as token ids, to prompts of one length, after so many readings of the haystack alone.

        Nothing of the model or its fast state changes. Raises ValueError if the prompts' parts differ in length.
        """
        haystack_BT = self._stack([prompt.haystack for prompt in prompts])
        question_BT = self._stack([prompt.question for prompt in prompts])
        new_tokens = max(prompt.answer_tokens for prompt in prompts)
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                cache = self._begin(len(prompts))
                for _ in range(readings):
                    self._read(haystack_BT, cache)
                    cache.finish()
                    cache.forget_mixers()
                logits_BV = self._read(torch.cat([haystack_BT, question_BT], dim=1), cache)
                answer_BT = self._decode(logits_BV, new_tokens, cache)
        finally:
            self._model.train(was_training)
        return [list(map(int, row)) for row in answer_BT.tolist()]

    def _make_cache(self, batch: int) -> Any:
        if self._protocol == "official":
            return self._model.make_cache(batch, mode="official", memory="shared")
        return self._model.make_cache(batch, mode="aligned", memory="per_sequence")

    def _begin(self, batch: int) -> Any:
        if self._carried is None:
            return self._make_cache(batch)
        if batch != self._batch:
            raise ValueError(f"the carried memory is that of batches of {self._batch} samples; this one has {batch}")
        self._carried.forget_mixers()
        return self._carried

    def _stack(self, rows: Sequence[Any]) -> torch.Tensor:
        if len({len(row) for row in rows}) != 1:
            raise ValueError("the prompts of a batch must have haystacks of one length and questions of one length")
        return torch.from_numpy(numpy.stack(rows)).to(self._device)

    def _read(self, tokens_BT: torch.Tensor, cache: Any) -> torch.Tensor:
        """Scores [B, V] of the token after these."""
        # In the official protocol every call is one chunk, so a reading is one call.
        size = tokens_BT.shape[1] if self._protocol == "official" else TOKENS_PER_CALL
        logits_BTV = torch.empty(0)
        for piece_BT in tokens_BT.split(size, dim=1):
            logits_BTV = self._model.logits(piece_BT, cache=cache)
        return logits_BTV[:, -1]

    def _decode(self, logits_BV: torch.Tensor, new_tokens: int, cache: Any) -> torch.Tensor:
        chosen = []
        for position in range(new_tokens):
            # The embedding is padded beyond the vocabulary: no answer may come from there.
            chosen.append(logits_BV[:, : self._vocab_size].argmax(-1, keepdim=True))
            if position + 1 < new_tokens:
                logits_BV = self._model.logits(chosen[-1], cache=cache)[:, -1]
        return torch.cat(chosen, dim=1)
