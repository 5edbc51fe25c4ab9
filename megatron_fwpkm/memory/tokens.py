"""Tokens divided over the ranks of a group that all have the whole: each rank takes its part, and parts come together.

With plain tensor parallelism every rank has every token of its replica; inside a memory layer each works on its own
part of them. Who has what is known on all ranks alike, so nothing is asked: positions are given when this is made.

Letters: N tokens in all, Y tokens of this rank, E columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def summed_over(weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A weight that all ranks have, for use on this rank's part of the tokens; None: on all tokens.

    Backward: the gradient is summed over the ranks, so that every rank has that of all tokens. Once for each use, in
    autograd itself: whatever takes gradients of parameters finds them whole.
    """
    return weight if group is None else _SummedOver.apply(weight, group)  # type: ignore[no-any-return]


class _SummedOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class TokenParts:
    """Which rows of a [N, E] tensor belong to which rank of a group.

    Args:
        positions: for each rank its rows, int64; together every row once
        group: the ranks
        device: where the rows are
    """

    def __init__(
        self, positions: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device | str = "cpu"
    ) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.own = positions[self.rank].to(device)
        self.counts = [len(of_rank) for of_rank in positions]
        self.largest, self.tokens = max(self.counts), sum(self.counts)
        # Where each row stands among the parts, when each is padded to the largest.
        places = torch.empty(self.tokens, dtype=torch.int64)
        for rank, of_rank in enumerate(positions):
            places[of_rank] = rank * self.largest + torch.arange(len(of_rank))
        self.places = places.to(device)

    def take(self, whole_NE: Tensor) -> Tensor:
        """This rank's rows [Y, E] of what all ranks have.

        Backward: the rows' gradients of all ranks come together, so that every rank has the gradient of the whole.
        """
        return _Take.apply(whole_NE, self)  # type: ignore[no-any-return]

    def gather(self, own_YE: Tensor) -> Tensor:
        """[N, E] of every rank's rows, on all ranks. Backward: this rank's rows of the gradient, which all have."""
        return _Gather.apply(own_YE, self)  # type: ignore[no-any-return]

    def all_rows(self, own_YE: Tensor) -> Tensor:
        """As `gather`, without autograd."""
        padded = own_YE.new_zeros(self.largest, *own_YE.shape[1:])
        padded[: own_YE.shape[0]] = own_YE
        parts = padded.new_empty(len(self.counts) * self.largest, *own_YE.shape[1:])
        if self.largest:
            dist.all_gather_into_tensor(parts, padded, group=self.group)
        return parts.index_select(0, self.places)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, parts: TokenParts) -> Tensor:
        ctx.parts = parts
        return whole.index_select(0, parts.own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.parts.all_rows(gradient), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, parts: TokenParts) -> Tensor:
        ctx.parts = parts
        return parts.all_rows(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.index_select(0, ctx.parts.own), None
