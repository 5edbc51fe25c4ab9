"""Between tokens and rows: where a chunk's reads go, and what comes back.

The mathematics of a chunk (chunk.py, backward.py) is written once, for two sides. The *token side* has this rank's
tokens: queries, targets, gates, errors. The *row side* has the rows that this rank owns and, of all tokens of the
memory group, the reads that address them. On one rank both sides are the same, and nothing is moved (`LocalGroup`).
Over a group either each read goes to the owner of its slot (`sharding.py`, in padded messages `static_routing.py`), or
each rank has some columns of all slots (`column_sharding.py`).

With columns the token side is in two parts itself: queries (and what comes of them: slots, weights and their gradients)
of this rank's share of the tokens; targets, reads, errors and gates of all tokens, in this rank's columns. Letters tell
them apart only where they may differ.

Letters: Y tokens of this rank in a chunk (queries or vectors), P reads of a token, Q (token, owner) pairs or tokens on
the row side, E reads there, U rows of this rank that are touched, D width of values on this rank, M memories.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fwpkm_kernels import SlotPlan, plan_slots


class ChunkShape(NamedTuple):
    """A chunk as all ranks know it."""

    sequences: int
    """Sequences of this rank's batch."""
    length: int
    """Tokens of a sequence in the chunk, on all ranks that share the batch."""
    memories: int
    """Memories of the batch: one, or one for each sequence."""


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
        """[Y, P]: a number of each read, in the shape of the plan's index, to its query; terms of columns are added."""
        ...

    def reads_to_rows(self, value_YP: Tensor) -> Tensor:
        """A number of each query's reads to where the rows are, in the shape of the plan's index."""
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

    @property
    def batches(self) -> int:
        """Batches of as many sequences each, from several replicas, that write one memory together."""
        ...

    @property
    def tables(self) -> int:
        """Replicas whose memories are apart but have their rows spread over all ranks alike."""
        ...

    @property
    def columns(self) -> int:
        """Ranks that the columns of every row are spread over; 1: rows are whole."""
        ...

    def route(self, slot_YP: Tensor, weight_YP: Tensor, shape: ChunkShape) -> Route:
        """Send the reads of this rank's tokens to where their rows are; all ranks call this together."""
        ...

    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...], shape: ChunkShape) -> Route:
        """A route that was made before."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Of queries and sub-keys: the sum over the ranks that share a memory, bitwise the same on each."""
        ...

    def count(self, number_M: Tensor) -> Tensor:
        """[tables * M]: numbers counted over this rank's gates and masks, for all tokens that write each memory."""
        ...

    def sum_columns(self, tensor: Tensor) -> Tensor:
        """Of vectors: the sum of terms that columns on different ranks contribute."""
        ...

    def anywhere(self, flag: Tensor) -> bool:
        """Whether a number [] is above 0 on any rank. (Waits for it.)"""
        ...

    def backward_pass(self) -> AbstractContextManager[None]:
        """Within the context exchanges belong to a backward pass."""
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

    size = batches = tables = columns = 1

    def route(self, slot_YP: Tensor, weight_YP: Tensor, shape: ChunkShape | None = None) -> LocalRoute:
        """Sort the reads by slot."""
        return LocalRoute(plan_slots(slot_YP), weight_YP)

    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...], shape: ChunkShape) -> LocalRoute:
        """A route that was made before."""
        return LocalRoute(plan, weight)

    def sum(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def count(self, number_M: Tensor) -> Tensor:
        """As it is."""
        return number_M

    def sum_columns(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def anywhere(self, flag: Tensor) -> bool:
        """Whether it is above 0."""
        return bool(flag > 0)

    def backward_pass(self) -> AbstractContextManager[None]:
        """Nothing to tell apart."""
        return nullcontext()


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


def count_owned_slots(n_subkeys: int, rank: int, ranks: int) -> int:
    """Slots that a rank owns."""
    return sum(len(range((rank - first) % ranks, n_subkeys, ranks)) for first in range(n_subkeys))


def own_columns(v_dim: int, rank: int, ranks: int) -> slice:
    """The columns of values that a rank has. Raises ValueError where they don't divide."""
    if v_dim % ranks:
        raise ValueError(
            f"v_dim is {v_dim}: its columns don't divide among {ranks} ranks; set v_dim to a multiple of {ranks}, or "
            "sharding to slots"
        )
    width = v_dim // ranks
    return slice(rank * width, (rank + 1) * width)
