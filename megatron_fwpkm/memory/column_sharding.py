"""Columns spread over ranks: every rank has all slots, and of each value D / R columns.

Each rank finds the slots of its share of a chunk's tokens; slots and weights go to all ranks. Reads, errors and writes
then are of all tokens in this rank's columns, and nothing of them moves. What moves in the backward pass are numbers:
dot products over columns are summed over ranks, for the gradients of slot weights (each rank gets those of its tokens)
and of gates (all ranks get all, once a call). So traffic does not depend on D; but each rank does the addressing's
bookkeeping (sorting, one access for each read) for all tokens, and moves D / R columns at a time.

Letters: as in routing.py; Y are this rank's tokens for queries, and all tokens of the chunk for vectors, in the order
of one rank that has them all; D the columns of this rank.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from fwpkm_kernels import SlotPlan, plan_slots
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.exchange import RankGroup, Shares
from megatron_fwpkm.memory.routing import ChunkShape, LocalRoute, own_columns


class ColumnRoute(LocalRoute):
    """Vectors are where their columns are; numbers of reads go between all ranks and the query's."""

    def __init__(self, shares: Shares, plan: SlotPlan, weight: Tensor) -> None:
        super().__init__(plan, weight)
        self._shares = shares

    def reads_to_tokens(self, value: Tensor) -> Tensor:
        """[tokens of this rank, P]: terms of the columns are added in the order of the ranks."""
        return self._shares.scatter_sum(value, "keys")

    def reads_to_rows(self, value_YP: Tensor) -> Tensor:
        """[all tokens, P]."""
        return self._shares.gather(value_YP, "keys")


class ColumnMemoryGroup(RankGroup):
    """A memory's columns over the ranks of a process group that share one batch.

    Args:
        group: the ranks
        config: the memory's settings

    Raises:
        ValueError: several replicas' ranks, or columns that don't divide among the ranks.
    """

    def __init__(self, group: dist.ProcessGroup, config: MemoryConfig, **options: Any) -> None:
        super().__init__(group, config.num_slots, config.reads_per_token, **options)
        if self.replicas > 1:
            raise ValueError(
                f"columns of a memory go over ranks that share one batch, but this group has those of {self.replicas} "
                "replicas: set sharding to slots, or keep the memory within a replica"
            )
        own_columns(config.v_dim, self.rank, self.size)
        self.columns = self.size

    def route(self, slot_YP: Tensor, weight_YP: Tensor, shape: ChunkShape) -> ColumnRoute:
        """Slots and weights of all tokens, on all ranks."""
        shares = self.shares(shape, slot_YP.device)
        slot_QP, weight_QP = self.gather_reads(slot_YP, weight_YP, shape)
        plan = plan_slots(slot_QP)
        self.traffic.add_chunk(slot_QP.numel(), plan.slots_U.numel(), self.size * slot_QP.numel())
        return ColumnRoute(shares, plan, weight_QP)

    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...], shape: ChunkShape) -> ColumnRoute:
        """A route that was made before."""
        return ColumnRoute(self.shares(shape, weight.device), plan, weight)

    def count(self, number_M: Tensor) -> Tensor:
        """As it is: every rank has the gates and masks of all tokens."""
        return number_M

    def sum_columns(self, tensor: Tensor) -> Tensor:
        """All-reduced, in a new tensor."""
        return self.links.all_reduce(tensor, "write")
