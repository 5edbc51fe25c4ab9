"""Sorted orders of addressed rows: what makes scatter sums deterministic and touched rows compact.

Letters in tensor names: X queries, P pairs of one query (heads * topk), E pairs of all queries, U distinct rows.

An index of pairs is a matrix [X, P], or *ragged*: a vector [E], query after query, with offsets [X + 1] of where each
query's pairs begin. Ranks that own rows get ragged ones: a query has some of its pairs on each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The pairs of an index, sorted (stably) by the row that they address.

    Attributes:
        order: [E] int64, positions in the flattened index, sorted by row
        offsets: [rows + 1] int64, pairs of row i are order[offsets[i] : offsets[i + 1]]
        pairs: P of a matrix, or of a ragged index the query [E] of each pair
    """

    order: Tensor
    offsets: Tensor
    pairs: int | Tensor

    @property
    def queries(self) -> Tensor:
        """[E] int64: the query of each sorted pair."""
        if isinstance(self.pairs, Tensor):
            return self.pairs[self.order]
        return torch.div(self.order, self.pairs, rounding_mode="floor")


@dataclass(frozen=True)
class SlotPlan:
    """The distinct slots that a chunk touches. One plan serves read, write and both backward passes.

    Attributes:
        slots_U: [U] int64, distinct slots in ascending order
        inverse_XP: [X, P] int64, or ragged [E]: position of each pair's slot in `slots_U`
        counts_U: [U] int64, number of pairs that address each slot
        segments: the pairs sorted by position
        offsets_X: of a ragged index [X + 1] int64, where each query's pairs begin; None for a matrix
    """

    slots_U: Tensor
    inverse_XP: Tensor
    counts_U: Tensor
    segments: Segments
    offsets_X: Tensor | None = None

    def by_pair(self, value_X: Tensor) -> Tensor:
        """A number of each query for its pairs: [X, 1] to go with a matrix, [E] of a ragged index."""
        if isinstance(self.segments.pairs, Tensor):
            return value_X[self.segments.pairs]
        return value_X.unsqueeze(1)


def plan_segments(index_XP: Tensor, num_rows: int) -> Segments:
    """Sort pairs by row where all rows 0..num_rows-1 get a segment, empty ones too. O(num_rows + pairs log pairs)."""
    flat = index_XP.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    offsets = flat.new_zeros(num_rows + 1)
    torch.cumsum(torch.bincount(flat, minlength=num_rows), 0, out=offsets[1:])
    return Segments(order, offsets, index_XP.shape[1])


def plan_slots(slots_XP: Tensor, offsets_X: Tensor | None = None) -> SlotPlan:
    """Find the distinct slots of int64 slot numbers, [X, P] or ragged. Cost depends on the number of pairs only."""
    flat = slots_XP.reshape(-1)
    sorted_slots, order = torch.sort(flat, stable=True)
    is_first = torch.ones_like(sorted_slots, dtype=torch.bool)
    torch.ne(sorted_slots[1:], sorted_slots[:-1], out=is_first[1:])
    starts = is_first.nonzero().view(-1)
    slots_U = sorted_slots[starts]
    inverse = torch.empty_like(flat)
    inverse[order] = torch.cumsum(is_first, 0) - 1
    offsets = torch.cat([starts, starts.new_full((1,), flat.numel())])
    pairs: int | Tensor = slots_XP.shape[-1]
    if offsets_X is not None:
        queries = torch.arange(offsets_X.numel() - 1, device=flat.device)
        pairs = queries.repeat_interleave(offsets_X.diff(), output_size=flat.numel())
    segments = Segments(order, offsets, pairs)
    return SlotPlan(slots_U, inverse.view_as(slots_XP), offsets.diff(), segments, offsets_X)
