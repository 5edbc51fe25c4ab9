"""Continued prompts: what the model says at an evaluation, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.model.decoder import Decoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Sampler:
    """Continues fixed held-out prompts. The ranks of the first replica have one each, and continue together."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, prompts_BT: torch.Tensor, new_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompts_BT = prompts_BT
        self._new_tokens = new_tokens

    def continue_prompts(self) -> list[list[int]]:
        """The prompts with their continuations; the model and its memories are as before afterwards."""
        words = self._tokenizer.get_vocab_size()
        return continue_greedily(self._model, self._prompts_BT, self._new_tokens, words).tolist()

    def write(self, folder: Path, step: int, continued: list[list[int]]) -> Path:
        """Write samples/step_<step>.txt."""
        prompt_length = self._prompts_BT.shape[1]
        parts = [
            f"step {step}: prompts from held-out text, continued greedily after >>> by {self._new_tokens} tokens\n"
        ]
        for number, row in enumerate(continued, start=1):
            prompt, continuation = (
                self._tokenizer.decode(part, skip_special_tokens=False)
                for part in (row[:prompt_length], row[prompt_length:])
            )
            parts.append(f"\n--- {number} ---\n{prompt}>>>{continuation}\n")
        path = folder / f"step_{step:08d}.txt"
        path.write_text("".join(parts))
        return path


def prompts_from(batches: Sequence[TokenBatch], number: int, length: int) -> torch.Tensor | None:
    """The beginnings [B, T] of the first `number` held-out sequences; None if none are asked for."""
    rows = [row for batch in batches for row in batch.tokens_BT[:, :length]][:number]
    return torch.stack(rows) if rows else None


@torch.no_grad()
def continue_greedily(model: Decoder, tokens_BT: torch.Tensor, new_tokens: int, vocab_size: int) -> torch.Tensor:
    """Append the likeliest token so many times; ids of the padding above `vocab_size` are never chosen.

    Reads everything anew for each token: a few short prompts only. Each reading starts from the fast state as it is.
    The tensor-parallel ranks of a replica call this together.
    """
    was_training = model.training
    tokens_BT = tokens_BT.to(next(model.parameters()).device)
    try:
        model.eval()
        for _ in range(new_tokens):
            with ExitStack() as guards:
                guards.enter_context(model.whole_sequences())
                for _, state in model.fast_states():
                    guards.enter_context(state.evaluation())
                # Each prompt is a document, for memories that want to know.
                documents_BT = torch.zeros_like(tokens_BT)
                logits_BV = model.logits(tokens_BT, documents_BT=documents_BT)[:, -1]
                logits_BV = model.whole_vocabulary(logits_BV)[:, :vocab_size]
            tokens_BT = torch.cat([tokens_BT, logits_BV.argmax(-1, keepdim=True)], dim=1)
    finally:
        model.train(was_training)
    return tokens_BT
