"""Slots spread over ranks, in padded messages of sizes that all ranks know beforehand: nobody asks how much there is.

Every rank's slots and weights go to all ranks, and each keeps the reads that it owns; errors go to all ranks likewise;
partial sums come back for every token, zeros from owners that have none of its slots. So nothing is counted and
exchanged before the messages, no host waits for counts, and nothing is dropped; the price is that a token costs R - 1
vectors each way instead of at most min(heads * topk, R), and an owner keeps the errors of all tokens until its backward
pass. It is for groups with R <= heads * topk or so, where most owners have a part of most tokens anyway.

Letters: as in routing.py; Q is all tokens of the chunk, in the order of one rank that has them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fwpkm_kernels import SlotPlan, plan_slots
from megatron_fwpkm.memory.exchange import Shares
from megatron_fwpkm.memory.routing import ChunkShape
from megatron_fwpkm.memory.sharding import SlotGroup


class StaticRoute:
    """The way of one chunk's reads; `owned_E` are their places among those of all tokens, flattened."""

    def __init__(self, shares: Shares, reads_per_token: int, plan: SlotPlan, weight: Tensor, owned_E: Tensor) -> None:
        self.plan, self.weight = plan, weight
        self._shares, self._reads_per_token, self._owned_E = shares, reads_per_token, owned_E

    def to_rows(self, vector_YD: Tensor, number_Y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Those of all tokens to all ranks; the number is a further column."""
        if number_Y is None:
            return self._shares.gather(vector_YD, "write"), None
        both_QD = self._shares.gather(torch.cat([vector_YD, number_Y.unsqueeze(1)], 1), "write")
        return both_QD[:, :-1].contiguous(), both_QD[:, -1].contiguous()

    def to_tokens(self, partial_QD: Tensor) -> Tensor:
        """Partial sums are added in the order of the owners' ranks."""
        return self._shares.scatter_sum(partial_QD, "read")

    def reads_to_tokens(self, value: Tensor) -> Tensor:
        """Each read has one owner: all others contribute 0."""
        value_QP = value.new_zeros(self.plan.offsets_X.numel() - 1, self._reads_per_token)  # type: ignore[union-attr]
        value_QP.view(-1)[self._owned_E] = value
        return self._shares.scatter_sum(value_QP, "keys")

    def reads_to_rows(self, value_YP: Tensor) -> Tensor:
        """Those of all tokens to all ranks, which keep their own."""
        return self._shares.gather(value_YP, "keys").view(-1)[self._owned_E]

    def saved(self) -> tuple[Tensor, ...]:
        """Places of the reads."""
        return (self._owned_E,)


class StaticMemoryGroup(SlotGroup):
    """Slots over ranks, in padded messages; arguments as `SlotGroup` has them."""

    def route(self, slot_YP: Tensor, weight_YP: Tensor, shape: ChunkShape) -> StaticRoute:
        """Send reads to all ranks; each keeps those of its rows, in the order of the tokens."""
        shares = self.shares(shape, slot_YP.device)
        slot_QP, weight_QP = self.gather_reads(slot_YP, weight_YP, shape)
        owner_QP, row_QP = self.owners.locate(slot_QP)
        here_QP = owner_QP == self.rank
        owned_E = here_QP.view(-1).nonzero().view(-1)
        offsets_Q = torch.cat([owned_E.new_zeros(1), here_QP.sum(1).cumsum(0)])
        plan = plan_slots(row_QP.view(-1)[owned_E], offsets_Q)
        self.traffic.add_chunk(owned_E.numel(), plan.slots_U.numel(), self.all_reads(shape))
        return StaticRoute(shares, self.reads_per_token, plan, weight_QP.view(-1)[owned_E], owned_E)

    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...], shape: ChunkShape) -> StaticRoute:
        """A route that was made before."""
        return StaticRoute(self.shares(shape, weight.device), self.reads_per_token, plan, weight, *saved)
