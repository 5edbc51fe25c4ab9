"""Between tokens and rows: where a chunk's reads go, and what comes back.

The mathematics of a chunk (chunk.py, backward.py) is written once, for two sides. The *token side* has this rank's
tokens: queries, targets, gates, errors. The *row side* has the rows that this rank owns and, of all tokens of the
memory group, the reads that address them. On one rank both sides are the same, and nothing is moved (`LocalGroup`).
Over a group each read goes to the owner of its slot (`sharding.py`).

Letters: Y tokens of this rank in a chunk, P reads of a token, Q (token, owner) pairs that arrived here, E reads that
arrived here, U rows of this rank that are touched, D value width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fwpkm_kernels import SlotPlan, plan_slots


class Route(Protocol):
    """The way of one chunk's reads, made once and used by read, write and both backward passes."""

    @property
    def plan(self) -> SlotPlan:
        """Rows of this rank and the reads that address them; counts are those of the whole group."""
        ...

    @property
    def weight(self) -> Tensor:
        """Slot weights of those reads, in the shape of the plan's index."""
        ...

    def to_rows(self, vector_YD: Tensor, number_Y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """A vector, and perhaps a number, of each token to the owners of its slots: [Q, D] and [Q]."""
        ...

    def to_tokens(self, partial_QD: Tensor) -> Tensor:
        """[Y, D]: sums of what the owners of a token's slots have found for it."""
        ...

    def reads_to_tokens(self, value: Tensor) -> Tensor:
        """[Y, P]: a number of each read, in the shape of the plan's index, back to its token."""
        ...

    def reads_to_rows(self, value_YP: Tensor) -> Tensor:
        """The inverse of `reads_to_tokens`."""
        ...

    def saved(self) -> tuple[Tensor, ...]:
        """Tensors from which `MemoryGroup.restore` makes the route again (the plan has its own)."""
        ...


class MemoryGroup(Protocol):
    """The ranks that one memory is spread over."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def route(self, slot_YP: Tensor, weight_YP: Tensor) -> Route:
        """Send the reads of this rank's tokens to the owners of their slots; all ranks call this together."""
        ...

    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...]) -> Route:
        """A route that was made before."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, bitwise the same on each."""
        ...


class LocalRoute:
    """Tokens and rows on one rank: nothing moves."""

    def __init__(self, plan: SlotPlan, weight: Tensor) -> None:
        self.plan, self.weight = plan, weight

    def to_rows(self, vector_YD: Tensor, number_Y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As they are."""
        return vector_YD, number_Y

    def to_tokens(self, partial_QD: Tensor) -> Tensor:
        """As it is."""
        return partial_QD

    def reads_to_tokens(self, value: Tensor) -> Tensor:
        """As it is."""
        return value

    def reads_to_rows(self, value_YP: Tensor) -> Tensor:
        """As it is."""
        return value_YP

    def saved(self) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()


class LocalGroup:
    """One rank with the whole memory."""

    size = 1

    def route(self, slot_YP: Tensor, weight_YP: Tensor) -> LocalRoute:
        """Sort the reads by slot."""
        return LocalRoute(plan_slots(slot_YP), weight_YP)

    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...]) -> LocalRoute:
        """A route that was made before."""
        return LocalRoute(plan, weight)

    def sum(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor


LOCAL = LocalGroup()


def owned_slots(n_subkeys: int, rank: int, ranks: int) -> Tensor:
    """[n * width] int64: the slots that a rank owns, in the order of its table; -1 where a line is short.

    Slot (a, b) belongs to rank (a + b) mod R, so that neither a hot a nor a hot b loads one rank alone. Line a of a
    rank's table holds b = (rank - a) mod R, + R, + 2 R, ...: `width` = ceil(n / R) places, of which the last is empty
    on some lines where R does not divide n.
    """
    width = -(-n_subkeys // ranks)
    first = torch.arange(n_subkeys)
    second = (rank - first).remainder(ranks).unsqueeze(1) + ranks * torch.arange(width)
    return torch.where(second < n_subkeys, first.unsqueeze(1) * n_subkeys + second, -1).flatten()
