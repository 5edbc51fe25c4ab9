"""Who works on which tokens of a memory layer's calls: the ranks of a replica divide them among themselves.

Chunks are read and written one after the other, so all ranks work on each chunk: a rank's own tokens are its 1/R of
every chunk (on one rank all, call by call). Outside the layer it has all tokens (plain tensor parallelism) or a stretch
of every sequence (sequence parallelism). A call is on whole sequences, or on documents of one length.

Letters: B sequences, T tokens, N sequences or documents of a call, L tokens of each; tokens are numbered b * T + t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fwpkm.memory.chunk import ChunkSpan
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.placement import Placement
from megatron_fwpkm.memory.sharding import token_share
from megatron_fwpkm.memory.tokens import TokenExchange, TokenParts

_Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CallShare:
    """This rank's share of one call: `batch` sequences, of each so many tokens, written with so many targets."""

    batch: int
    tokens: int
    targets: int
    spans: list[ChunkSpan]


class TokenDivision:
    """The tokens of one forward pass: where they are outside the layer, and who works on them inside.

    Args:
        calls: for each call of the memory its tokens, [N, L]; together every token once
        shape: B and T of the whole batch
        config: chunks and lookahead
        placement: the ranks
        device: where the tokens' tensors are

    Attributes:
        calls: this rank's share of each call
        own: numbers of its own tokens, call by call
    """

    def __init__(
        self,
        calls: Sequence[Tensor],
        shape: tuple[int, int],
        config: MemoryConfig,
        placement: Placement,
        device: torch.device | str,
    ) -> None:
        group, ranks = placement.tensor_group, placement.tensor_ranks
        own: list[Tensor] = []
        targets: list[Tensor] = []
        for rank in range(ranks):
            shares = [token_share(tokens_NL.shape[1], config, rank, ranks) for tokens_NL in calls]
            pairs = list(zip(calls, shares, strict=True))
            own.append(_join([tokens_NL[:, share.own] for tokens_NL, share in pairs]))
            targets.append(_join([tokens_NL[:, share.targets] for tokens_NL, share in pairs]))
            if rank == placement.tensor_rank:
                self.calls = [
                    CallShare(tokens_NL.shape[0], len(share.own), len(share.targets), share.spans)
                    for tokens_NL, share in pairs
                ]
        mine = placement.tensor_rank
        self.own = own[mine].to(device)
        self.sequence_parallel = placement.sequence_parallel and group is not None
        self._enter: _Move = _unmoved
        self._leave: _Move = _unmoved
        self._to_own: _Move = _unmoved
        self._back: _Move = _unmoved
        self._to_targets: _Move
        self._outside: TokenParts | None = None
        if group is None:
            place = torch.empty_like(self.own)
            place[self.own] = torch.arange(self.own.numel(), device=self.own.device)
            self._to_own, self._back = _Picked(self.own), _Picked(place)
            self._to_targets = _Picked(targets[mine].to(device))
        elif self.sequence_parallel:
            held = _stretches(shape, ranks)
            self._outside = TokenParts(held, group, device)
            self._to_own = TokenExchange(held, own, group, device)
            self._back = TokenExchange(own, held, group, device)
            self._to_targets = TokenExchange(held, targets, group, device)
        else:
            self._outside = TokenParts(own, group, device)
            self._enter, self._leave = self._outside.take, self._outside.gather
            self._to_targets = TokenExchange(own, targets, group, device)

    def enter(self, hidden_XE: Tensor) -> Tensor:
        """The rows that this rank projects: its own tokens where all ranks have all, else those that it has."""
        return self._enter(hidden_XE)

    def to_own(self, rows_XE: Tensor) -> Tensor:
        """Projected rows to the ranks that work on their tokens, call by call."""
        return self._to_own(rows_XE)

    def to_targets(self, value_XD: Tensor) -> Tensor:
        """Projected values to the ranks whose tokens are written with them, in the order that `fast_memory` wants."""
        return self._to_targets(value_XD)

    def back(self, rows_YD: Tensor) -> Tensor:
        """The inverse of `to_own`."""
        return self._back(rows_YD)

    def to_all(self, rows_XE: Tensor) -> Tensor:
        """Projected rows of all ranks, on every rank, in order of the tokens' numbers.

        Backward: the rows' gradients, which must be whole and the same on every rank.
        """
        return rows_XE if self._outside is None else self._outside.gather(rows_XE)

    def leave(self, rows_XE: Tensor) -> Tensor:
        """What the layer returns: the inverse of `enter`."""
        return self._leave(rows_XE)


def _join(numbers: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *(part.flatten() for part in numbers)])


def _unmoved(rows_XE: Tensor) -> Tensor:
    return rows_XE


class _Picked:
    """Rows of one rank in another order; a row may be picked several times or not at all."""

    def __init__(self, index: Tensor) -> None:
        self._index = index

    def __call__(self, rows_XE: Tensor) -> Tensor:
        return rows_XE.index_select(0, self._index)


def _stretches(shape: tuple[int, int], ranks: int) -> list[Tensor]:
    batch, tokens = shape
    if tokens % ranks:
        raise ValueError(f"{tokens} tokens of a sequence can't be divided among {ranks} sequence-parallel ranks")
    number_BT = torch.arange(batch * tokens).view(batch, tokens)
    return [stretch.flatten() for stretch in number_BT.chunk(ranks, 1)]
