"""Overlay memories: written copies of touched rows over a base table that stays as it is.

A throw-away or per-sequence memory must not cost O(N), so it owns only the rows that it has written, found through a
sparse set: `position[slot]` may hold anything until it is confirmed by `slots[position[slot]] == slot`. That needs no
clearing, so neither making nor dropping an overlay touches more than the touched rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_fwpkm.memory.fast_state import FastState
    from megatron_fwpkm.memory.whole_state import WholeState

# Stored rows are rescaled when lazy decay has shrunk them this far, long before float32 runs out of exponents.
_RESCALE_BELOW = 2.0**-20


def usable_in_training(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can save if it was made under `torch.inference_mode`."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class StaleOverlayError(RuntimeError):
    """The base memory was written after the overlay was laid over it."""


def _unset(length: int, device: torch.device) -> Tensor:
    """int32 [length] of whatever is there. (torch.empty would fill it when deterministic algorithms are asked for.)"""
    storage = torch.UntypedStorage(4 * length, device=device)
    return torch.empty(0, dtype=torch.int32, device=device).set_(storage, 0, (length,), (1,))


class Overlay:
    """`memories` independent memories that all start as the base is now. Slot numbers are memory * N + slot.

    Of a memory that is spread over the ranks of several replicas it has rows of as many `tables`, `memories` each, one
    after the other; sub-keys are those of this rank's replica.
    """

    def __init__(self, base: FastState | WholeState, memories: int, tables: int = 1) -> None:
        self.base, self.memories, self.tables, self.num_slots = base, memories, tables, base.num_slots
        self._keys_MH2nd = base.keys_H2nd.unsqueeze(0).expand(memories, -1, -1, -1, -1)
        self._base_generation = base.generation
        self._base_factor = base.scale  # what an untouched row is multiplied with
        self._factor = 1.0  # what a stored row is multiplied with
        self._position = _unset(tables * memories * base.num_slots, base.device)
        self._slots = torch.empty(0, dtype=torch.int64, device=base.device)
        self._rows = torch.empty(0, base.v_dim, dtype=base.dtype, device=base.device)
        self._count = 0
        self._broken = False
        self._several = tables * memories > 1

    @property
    def keys_MH2nd(self) -> Tensor:
        """Sub-keys [M, H, 2, n, d] of each memory."""
        return self._keys_MH2nd

    @property
    def num_touched(self) -> int:
        """Number of rows that differ from the base."""
        return self._count

    def touched_slots(self) -> Tensor:
        """[touched] int64: slots (memory * N + slot) that were written."""
        return self._slots[: self._count]

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call that fails half-way leaves the overlay unusable: it can be dropped or cleared, not gone on with."""
        try:
            yield
        except BaseException:
            self._broken = True
            raise

    def check_usable(self) -> None:
        """Raise if this memory can't be gone on with.

        Raises:
            StaleOverlayError: the base was written since the overlay was made.
            RuntimeError: an earlier call failed half-way.
        """
        if self._broken:
            raise RuntimeError(
                "an earlier call failed while it wrote this memory; roll the step back, or make a new evaluation or "
                "cache"
            )
        if self.base.generation != self._base_generation:
            raise StaleOverlayError(
                "the fast state under this overlay was written after the overlay was made; make a new cache or "
                "finish using the old one before training goes on"
            )

    def _find(self, slots_U: Tensor) -> tuple[Tensor, Tensor]:
        position = self._position[slots_U].long()
        inside = (position >= 0) & (position < self._count)
        position = position.where(inside, 0)
        if self._count == 0:
            return position, inside
        return position, inside & (self._slots[position] == slots_U)

    def read_rows(self, slots_U: Tensor) -> Tensor:
        """True values [U, D] of distinct slots, as a new tensor. Raises as `check_usable` does."""
        self.check_usable()
        rows = self.base.stored_rows(slots_U % self.base.num_slots if self._several else slots_U)
        if self._base_factor != 1.0:
            rows.mul_(self._base_factor)
        position, found = self._find(slots_U)
        here = found.nonzero().view(-1)
        if here.numel():
            stored = self._rows.index_select(0, position[here])
            if self._factor != 1.0:
                stored.mul_(self._factor)
            rows.index_copy_(0, here, stored)
        return rows

    def write_rows(self, slots_U: Tensor, before_UD: Tensor, change_UD: Tensor, decay: float) -> None:
        """Set rows to decay * before + change, and decay all others."""
        self._base_factor *= decay
        self._factor *= decay
        if 0 < self._factor < _RESCALE_BELOW:
            self._rows[: self._count] *= self._factor
            self._factor = 1.0
        rows = torch.add(change_UD, before_UD, alpha=decay)
        if self._factor != 1.0:
            rows.div_(self._factor)
        position, found = self._find(slots_U)
        new = (~found).nonzero().view(-1)
        if new.numel():
            end = self._count + new.numel()
            self._reserve(end)
            added = torch.arange(self._count, end, device=slots_U.device)
            new_slots = slots_U[new]
            self._slots[self._count : end] = new_slots
            self._position[new_slots] = added.int()
            position[new] = added
            self._count = end
        self._rows.index_copy_(0, position, rows)

    def write_keys(self, keys_MH2nd: Tensor) -> None:
        """Replace the sub-keys."""
        self._keys_MH2nd = usable_in_training(keys_MH2nd)

    def _reserve(self, rows: int) -> None:
        if rows <= self._slots.numel():
            return
        capacity = max(rows, 2 * self._slots.numel(), 256)
        for name in ("_slots", "_rows"):
            old = getattr(self, name)
            grown = old.new_empty(capacity, *old.shape[1:])
            grown[: self._count] = old[: self._count]
            setattr(self, name, grown)

    def clear(self) -> None:
        """Forget everything written; the memories are the base's again."""
        self._keys_MH2nd = self.base.keys_H2nd.unsqueeze(0).expand(self.memories, -1, -1, -1, -1)
        self._base_generation, self._base_factor, self._factor = self.base.generation, self.base.scale, 1.0
        self._count = 0
        self._broken = False

    def values_ND(self, memory: int = 0) -> Tensor:
        """Dense copy [N, D] of one memory. O(N): for tests and for saving."""
        slots = torch.arange(self.base.num_slots, device=self.base.device) + memory * self.base.num_slots
        return self.read_rows(slots)

    def commit(self) -> None:
        """Write a single memory back into the base. O(touched rows) unless weights decayed.

        Raises:
            ValueError: there is more than one memory, so the base could not hold them.
        """
        if self._several:
            raise ValueError(
                f"this overlay has {self.memories * self.tables} memories; only a single one can be written back"
            )
        slots = self.touched_slots().clone()
        self.base.replace_rows(slots, self.read_rows(slots), self._base_factor / self.base.scale)
        self.base.write_keys(self.keys_MH2nd)
        self.clear()
