"""Sorted orders of addressed rows: what makes scatter sums deterministic and touched rows compact.

Letters in tensor names: X queries, P pairs of one query (heads * topk), U distinct rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The pairs of an index [X, P], sorted (stably) by the row that they address.

    Attributes:
        order: [X * P] int64, positions in the flattened index, sorted by row
        offsets: [rows + 1] int64, pairs of row i are order[offsets[i] : offsets[i + 1]]
        pairs: P, to find the query of a flattened position
    """

    order: Tensor
    offsets: Tensor
    pairs: int

    @property
    def queries(self) -> Tensor:
        """[X * P] int64: the query of each sorted pair."""
        return torch.div(self.order, self.pairs, rounding_mode="floor")


@dataclass(frozen=True)
class SlotPlan:
    """The distinct slots that a chunk touches. One plan serves read, write and both backward passes.

    Attributes:
        slots_U: [U] int64, distinct slots in ascending order
        inverse_XP: [X, P] int64, position of each pair's slot in `slots_U`
        counts_U: [U] int64, number of pairs that address each slot
        segments: the pairs sorted by position
    """

    slots_U: Tensor
    inverse_XP: Tensor
    counts_U: Tensor
    segments: Segments


def plan_segments(index_XP: Tensor, num_rows: int) -> Segments:
    """Sort pairs by row where all rows 0..num_rows-1 get a segment, empty ones too. O(num_rows + pairs log pairs)."""
    flat = index_XP.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    offsets = flat.new_zeros(num_rows + 1)
    torch.cumsum(torch.bincount(flat, minlength=num_rows), 0, out=offsets[1:])
    return Segments(order, offsets, index_XP.shape[1])


def plan_slots(slots_XP: Tensor) -> SlotPlan:
    """Find the distinct slots of [X, P] int64 slot numbers. Cost depends on the number of pairs only, never on N."""
    flat = slots_XP.reshape(-1)
    sorted_slots, order = torch.sort(flat, stable=True)
    is_first = torch.ones_like(sorted_slots, dtype=torch.bool)
    torch.ne(sorted_slots[1:], sorted_slots[:-1], out=is_first[1:])
    starts = is_first.nonzero().view(-1)
    slots_U = sorted_slots[starts]
    inverse = torch.empty_like(flat)
    inverse[order] = torch.cumsum(is_first, 0) - 1
    offsets = torch.cat([starts, starts.new_full((1,), flat.numel())])
    segments = Segments(order, offsets, slots_XP.shape[1])
    return SlotPlan(slots_U, inverse.view_as(slots_XP), offsets.diff(), segments)
