"""Exchanges between the ranks of a memory group, each counted, and where the tokens of a chunk are among the ranks.

Letters: R ranks, B sequences of a batch, C tokens of a chunk, Y tokens of this rank in it, Q tokens of all ranks in it,
S the largest share of a rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from fwpkm_kernels import SlotPlan
from megatron_fwpkm.memory.routing import ChunkShape, Route
from megatron_fwpkm.memory.traffic import Phase, Traffic

_SHARES_KEPT = 64  # calls of one length need one or two; documents are of many lengths


class Links:
    """The collectives over one process group; None stands for this rank alone."""

    def __init__(self, group: dist.ProcessGroup | None, traffic: Traffic) -> None:
        self.group, self.traffic = group, traffic
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def all_to_all(self, sent: Tensor, counts_out: list[int], counts_in: list[int], phase: Phase) -> Tensor:
        """Stretches of rows along the first axis, to each rank its own."""
        arrived = sent.new_empty(sum(counts_in), *sent.shape[1:])
        dist.all_to_all_single(arrived, sent.contiguous(), counts_in, counts_out, group=self.group)
        others = [count for rank, count in enumerate(counts_out) if rank != self.rank and count]
        self.traffic.add(phase, sum(others) * _row_bytes(sent), len(others))
        return arrived

    def all_to_all_even(self, sent: Tensor, phase: Phase) -> Tensor:
        """R equal stretches of rows along the first axis, to each rank its own."""
        sent = sent.contiguous()
        arrived = torch.empty_like(sent)
        if sent.numel() == 0:
            return arrived
        dist.all_to_all_single(arrived, sent, group=self.group)
        others = self.size - 1
        self.traffic.add(phase, sent.shape[0] // self.size * others * _row_bytes(sent), others)
        return arrived

    def all_gather(self, own: Tensor, phase: Phase) -> Tensor:
        """The rows of all ranks, which have equally many."""
        parts = own.new_empty(self.size * own.shape[0], *own.shape[1:])
        if own.numel() == 0:
            return parts
        dist.all_gather_into_tensor(parts, own.contiguous(), group=self.group)
        others = self.size - 1
        self.traffic.add(phase, own.shape[0] * others * _row_bytes(own), others)
        return parts

    def all_reduce(self, tensor: Tensor, phase: Phase) -> Tensor:
        """The sum over all ranks, bitwise the same on each, in a new tensor."""
        total = tensor.clone()
        if self.size == 1:
            return total
        dist.all_reduce(total, group=self.group)
        steps = 2 * (self.size - 1)
        self.traffic.add(phase, steps * -(-total.numel() // self.size) * total.element_size(), steps)
        return total


def pack(ids: Tensor, numbers: Tensor) -> Tensor:
    """Ids [..., P] and numbers [..., P] as bytes [..., P, i + w], to go in one message."""
    return torch.cat([part.contiguous().unsqueeze(-1).view(torch.uint8) for part in (ids, numbers)], -1)


def unpack(packed: Tensor, ids: torch.dtype, numbers: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`; ids as int64."""
    # Copies, which contiguous() may not make of few or no rows: a wider type must begin at a multiple of its size.
    split = packed.split([ids.itemsize, numbers.itemsize], -1)
    parts = [part.clone(memory_format=torch.contiguous_format) for part in split]
    return parts[0].view(ids).squeeze(-1).long(), parts[1].view(numbers).squeeze(-1)


def _row_bytes(tensor: Tensor) -> int:
    return tensor[:1].numel() * tensor.element_size() if tensor.shape[0] else 0


def share_bounds(length: int, ranks: int) -> list[int]:
    """[ranks + 1]: the tokens of a chunk are divided evenly, whatever is left over to the ranks in turn."""
    return [length * rank // ranks for rank in range(ranks + 1)]


class Shares:
    """The tokens of a chunk among the ranks, when the rows of each rank are padded to the largest share.

    The order of all tokens is that of one rank that has them all: batch, sequence, token.
    """

    def __init__(self, shape: ChunkShape, links: Links, batches: int, device: torch.device) -> None:
        tensor_ranks = links.size // batches
        starts = torch.tensor(share_bounds(shape.length, tensor_ranks))
        lengths = starts.diff()
        self._links = links
        self.own = shape.sequences * int(lengths[links.rank % tensor_ranks])
        """Tokens of this rank."""
        self.largest = shape.sequences * int(lengths.max())
        """Tokens of the rank that has most."""
        rank_C = torch.arange(tensor_ranks).repeat_interleave(lengths)
        inside_C = torch.arange(shape.length) - starts[rank_C]
        sequence_B1 = torch.arange(shape.sequences).unsqueeze(1)
        place_BC = rank_C * self.largest + sequence_B1 * lengths[rank_C] + inside_C
        batch_N1 = torch.arange(batches).unsqueeze(1) * (tensor_ranks * self.largest)
        self._place_Q = (batch_N1 + place_BC.flatten()).flatten().to(device)

    def gather(self, own: Tensor, phase: Phase) -> Tensor:
        """Rows [Y, ...] of this rank's tokens to [Q, ...] of all."""
        if self.own < self.largest:
            padded = own.new_zeros(self.largest, *own.shape[1:])
            padded[: self.own] = own
            own = padded
        return self._links.all_gather(own, phase).index_select(0, self._place_Q)

    def scatter_sum(self, value: Tensor, phase: Phase) -> Tensor:
        """Rows [Q, ...] of all tokens, a term on each rank, to their sums [Y, ...] of this rank's, in ranks' order."""
        spread = value.new_zeros(self._links.size * self.largest, *value.shape[1:])
        spread.index_copy_(0, self._place_Q, value)
        arrived = self._links.all_to_all_even(spread, phase)
        return arrived.unflatten(0, (self._links.size, self.largest))[:, : self.own].sum(0)


class RankGroup(ABC):
    """What all memory groups over several ranks have in common.

    Args:
        group: the ranks
        num_slots: slots of one memory
        reads_per_token: heads * topk
        replicas: batches that the ranks have among them; the ranks of one batch follow each other
        apart: each replica's batch has memories of its own, whose rows are spread over all ranks
        tensor_group: with `apart`, the ranks that share this rank's batch; None where it has one alone

    Attributes:
        traffic: what was sent
    """

    columns = 1

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_slots: int,
        reads_per_token: int,
        *,
        replicas: int = 1,
        apart: bool = False,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if self.size % replicas:
            raise ValueError(f"{self.size} ranks of a memory group can't have the batches of {replicas} replicas")
        self.num_slots, self.reads_per_token, self.replicas = num_slots, reads_per_token, replicas
        self.batches, self.tables = (1, replicas) if apart else (replicas, 1)
        self.traffic = Traffic(self.size)
        self.links = Links(group, self.traffic)
        self._of_batch = self.links
        if self.tables > 1:
            self._of_batch = Links(tensor_group, self.traffic)
            if self._of_batch.size * replicas != self.size:
                raise ValueError(
                    f"{self._of_batch.size} ranks share a batch and {replicas} replicas a memory group of {self.size}"
                )
        self._shares: dict[tuple[ChunkShape, torch.device], Shares] = {}

    @abstractmethod
    def route(self, slot_YP: Tensor, weight_YP: Tensor, shape: ChunkShape) -> Route:
        """Send the reads of this rank's tokens to where their rows are."""

    @abstractmethod
    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...], shape: ChunkShape) -> Route:
        """A route that was made before."""

    def shares(self, shape: ChunkShape, device: torch.device) -> Shares:
        """Which rank has which tokens of a chunk."""
        key = shape, device
        if key not in self._shares:
            if len(self._shares) >= _SHARES_KEPT:
                self._shares.clear()
            self._shares[key] = Shares(shape, self.links, self.replicas, device)
        return self._shares[key]

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduced over the ranks that share a memory, in a new tensor."""
        return self._of_batch.all_reduce(tensor, "keys")

    def count(self, number_M: Tensor) -> Tensor:
        """[tables * M]: all ranks' numbers, each replica's in its place where memories are apart."""
        placed = number_M.new_zeros(self.tables, number_M.shape[0])
        placed[self.table] = number_M
        return self.links.all_reduce(placed.flatten(), "write")

    def sum_columns(self, tensor: Tensor) -> Tensor:
        """As it is: rows are whole."""
        return tensor

    def anywhere(self, flag: Tensor) -> bool:
        """Whether a number [] is above 0 on any rank."""
        return bool(self.links.all_reduce(flag, "plan") > 0)

    def backward_pass(self) -> AbstractContextManager[None]:
        """Within the context exchanges are counted as the backward pass's."""
        return self.traffic.backward_pass()

    @property
    def table(self) -> int:
        """Which of the `tables` this rank's batch writes."""
        return self.rank * self.tables // self.size

    def number(self, slot_YP: Tensor, shape: ChunkShape) -> Tensor:
        """Slots in the numbering of all tables: (table * M + memory) * N + slot."""
        return slot_YP + self.table * shape.memories * self.num_slots if self.table else slot_YP

    def gather_reads(self, slot_YP: Tensor, weight_YP: Tensor, shape: ChunkShape) -> tuple[Tensor, Tensor]:
        """Slots [Q, P] (in the numbering of all tables) and weights of all tokens, on all ranks."""
        kind = id_type(self.tables * shape.memories * self.num_slots)
        sent = pack(self.number(slot_YP, shape).to(kind), weight_YP)
        return unpack(self.shares(shape, slot_YP.device).gather(sent, "plan"), kind, weight_YP.dtype)

    def all_reads(self, shape: ChunkShape) -> int:
        """Reads of a chunk on all ranks."""
        return self.replicas * shape.sequences * shape.length * self.reads_per_token


def id_type(count: int) -> torch.dtype:
    """The integers in which ids below `count` are sent."""
    return torch.int32 if count <= 2**31 else torch.int64
