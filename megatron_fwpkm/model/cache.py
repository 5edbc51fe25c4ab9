"""Inference caches: what each layer keeps of the tokens that it has seen.

A stream may be cut into calls of any size; outputs do not depend on the cut (the memories in `official` mode excepted).

Shape legend: B batch, S tokens kept, H key and value heads, D head width, C channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_fwpkm.memory import MemoryCache


class AttentionCache:
    """Keys (rotated) and values of one attention layer: all of them, or the last `keep`."""

    def __init__(self, keep: int | None = None) -> None:
        self._keep = keep
        self._length = 0
        self._tensors: list[torch.Tensor] = []  # keys, values [B, capacity, H, D]
        self._mask_BS: torch.Tensor | None = None

    def __len__(self) -> int:
        return self._length

    def extend(
        self, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor, mask_BT: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Add new tokens; returns keys, values and mask of the kept ones and the new ones, in order.

        The tensors returned are valid until the next call.
        """
        end = self._length + k_BTHD.shape[1]
        self._extend_mask(k_BTHD, mask_BT)
        for index, new in enumerate((k_BTHD, v_BTHD)):
            if len(self._tensors) <= index:
                self._tensors.append(new.new_empty(new.shape[0], 0, *new.shape[2:]))
            kept = self._tensors[index]
            if end > kept.shape[1]:
                # Doubled, so that a stream of T tokens is copied O(T) times in all and not at every token.
                capacity = end if self._length == 0 else max(end, 2 * kept.shape[1])
                grown = new.new_empty(new.shape[0], capacity, *new.shape[2:])
                grown[:, : self._length] = kept[:, : self._length]
                self._tensors[index] = kept = grown
            kept[:, self._length : end] = new
        keys, values = (tensor[:, :end] for tensor in self._tensors)
        mask = self._mask_BS
        self._length = end
        if self._keep is not None and end > self._keep:
            self._trim(self._keep)
        return keys, values, mask

    def _extend_mask(self, like: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """A mask is kept from the first call that has one; tokens without one are real."""
        if mask_BT is None and self._mask_BS is None:
            return
        batch, new = like.shape[:2]
        before, after = self._mask_BS, mask_BT
        if before is None:
            before = torch.ones(batch, self._length, dtype=torch.bool, device=like.device)
        if after is None:
            after = torch.ones(batch, new, dtype=torch.bool, device=like.device)
        self._mask_BS = torch.cat([before, after], 1)

    def _trim(self, keep: int) -> None:
        # Copies: the caller still reads the old tensors, and a view would hold on to all of them.
        self._tensors = [tensor[:, self._length - keep : self._length].clone() for tensor in self._tensors]
        if self._mask_BS is not None:
            self._mask_BS = self._mask_BS[:, self._length - keep :]
        self._length = keep


class DeltaNetCache:
    """The last inputs of a gated delta net's convolution, and its state."""

    def __init__(self) -> None:
        self.inputs_BSC: torch.Tensor | None = None
        self.state: torch.Tensor | None = None
        """[B, value heads, key width, value width]"""


MixerCache = AttentionCache | DeltaNetCache
NewMixerCache = Callable[[], MixerCache]


@dataclass
class LayerCache:
    """What one block keeps."""

    mixer: MixerCache
    memory: MemoryCache | None


class DecoderCache:
    """What a decoder keeps of a batch of streams; made by `Decoder.make_cache`, used by `Decoder.logits`."""

    def __init__(self, batch: int, new_mixers: Sequence[NewMixerCache], memories: Sequence[MemoryCache | None]) -> None:
        """`new_mixers` make the empty cache of each block's mixer."""
        self.batch = batch
        self._new_mixers = list(new_mixers)
        self.layers = [LayerCache(new(), memory) for new, memory in zip(new_mixers, memories, strict=True)]
        self.num_tokens = 0
        """Tokens seen since the mixers last started anew, padding included."""
        self.real_tokens_B: torch.Tensor | None = None
        """[B] tokens seen less padding; None before the first call."""

    def check_batch(self, batch: int) -> None:
        """Raise ValueError for tokens of another batch size."""
        if batch != self.batch:
            raise ValueError(f"the cache was made for {self.batch} sequences; this call has {batch}")

    def count(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Note tokens that all layers have taken."""
        batch, length = tokens_BT.shape
        new = torch.full((batch,), length, device=tokens_BT.device) if mask_BT is None else mask_BT.sum(1)
        self.real_tokens_B = new if self.real_tokens_B is None else self.real_tokens_B + new
        self.num_tokens += length

    def forget_mixers(self) -> None:
        """Let attention, delta nets and positions start anew; the memories stay: for reading a context again."""
        for layer, new in zip(self.layers, self._new_mixers, strict=True):
            layer.mixer = new()
        self.num_tokens, self.real_tokens_B = 0, None

    def finish(self) -> None:
        """Write the tokens that wait for their chunk to fill into the memories; the next token starts a new chunk."""
        for memory in self.memories():
            memory.finish()

    def memories(self) -> list[MemoryCache]:
        """The memory caches of the blocks that have one, in order."""
        return [layer.memory for layer in self.layers if layer.memory is not None]
