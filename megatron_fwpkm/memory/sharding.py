"""Slots spread over the ranks of a group: every read goes to the owner of its slot, and partial sums come back.

Per chunk the ranks exchange, all-to-all: reads (slot and weight) with the number of reads of each (token, owner) pair;
then one vector for each such pair in each direction of read and write, and in each direction of their backward passes.
An owner reduces its rows before it answers, so a token costs at most min(heads * topk, R) vectors each way. Splits are
uneven; nothing is dropped or padded. (`static_routing.py` pads, and need not ask how much there is.)

A group may hold the ranks of several replicas, each with a batch of its own. Either these batches write one memory
together, as one larger batch would; or each has memories `apart` (one for each sequence), whose rows are spread over
all ranks: memory m of replica p is memory p * M + m on the row side.

Letters: as in routing.py; R ranks, N rows of this rank's table for one memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fwpkm_kernels import SlotPlan, plan_slots
from megatron_fwpkm.memory.chunk import ChunkSpan, chunk_bounds
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.exchange import RankGroup, id_type, pack, share_bounds, unpack
from megatron_fwpkm.memory.routing import ChunkShape


class Owners:
    """Which rank owns a slot, and where in its table: see `routing.owned_slots`."""

    def __init__(self, n_subkeys: int, ranks: int) -> None:
        self.n_subkeys, self.ranks = n_subkeys, ranks
        self.width = -(-n_subkeys // ranks)
        self.rows = n_subkeys * self.width
        """Rows of a rank's table, for one memory."""

    def locate(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Owner and row of slots in the numbering memory * n² + slot; rows are numbered memory * rows + row."""
        memory = torch.div(slot, self.n_subkeys**2, rounding_mode="floor")
        first = torch.div(slot, self.n_subkeys, rounding_mode="floor") - memory * self.n_subkeys
        second = slot - (memory * self.n_subkeys + first) * self.n_subkeys
        row = first * self.width + torch.div(second, self.ranks, rounding_mode="floor")
        return (first + second) % self.ranks, memory * self.rows + row


@dataclass(frozen=True)
class TokenShare:
    """One rank's part of every chunk of a sequence.

    Attributes:
        spans: chunk by chunk, as `fast_memory` wants them
        own: [tokens] positions of its tokens in the sequence
        targets: [pairs] positions of the values that those of its tokens are written with that have one
    """

    spans: list[ChunkSpan]
    own: Tensor
    targets: Tensor


def column_share(tokens: int, config: MemoryConfig, rank: int, ranks: int) -> TokenShare:
    """As `token_share`, where columns are spread: `own` are the queries' tokens; targets are those of all tokens."""
    own = token_share(tokens, config, rank, ranks)
    whole = token_share(tokens, config, 0, 1)
    spans = [replace(of_all, queries=of_own.queries) for of_own, of_all in zip(own.spans, whole.spans, strict=True)]
    return TokenShare(spans, own.own, whole.targets)


def token_share(tokens: int, config: MemoryConfig, rank: int, ranks: int) -> TokenShare:
    """This rank's part of each chunk, as `exchange.share_bounds` divides it: all work on each chunk together."""
    spans: list[ChunkSpan] = []
    own: list[int] = []
    targets: list[int] = []
    for start, end in chunk_bounds(tokens, config):
        length = end - start
        first, last = (start + bound for bound in share_bounds(length, ranks)[rank : rank + 2])
        pairs = max(length - config.lookahead, 0)
        with_target = min(max(start + pairs - first, 0), last - first)
        before = len(own), len(targets)
        own += range(first, last)
        targets += range(first + config.lookahead, first + config.lookahead + with_target)
        tokens_here, targets_here = slice(before[0], len(own)), slice(before[1], len(targets))
        spans.append(ChunkSpan(tokens_here, tokens_here, targets_here, length, pairs))
    return TokenShare(spans, torch.tensor(own, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64))


class GroupRoute:
    """The way of one chunk's reads over a process group. Counts are tokens' and owners' sides of the same pairs."""

    def __init__(self, group: ProcessMemoryGroup, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...]) -> None:
        self._group, self.plan, self.weight = group, plan, weight
        # Reads of this rank's tokens in the order in which they are sent; the token of each pair that is sent; numbers
        # [R] of pairs and reads that are sent and that arrive.
        self._order, self._token_of_pair, splits = saved
        self._splits = splits
        (self._pairs_out, self._reads_out, self._pairs_in, self._reads_in) = splits.tolist()

    def to_rows(self, vector_YD: Tensor, number_Y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One message: the number is a further column."""
        if number_Y is not None:
            vector_YD = torch.cat([vector_YD, number_Y.unsqueeze(1)], 1)
        sent = vector_YD.index_select(0, self._token_of_pair)
        arrived = self._group.links.all_to_all(sent, self._pairs_out, self._pairs_in, "write")
        if number_Y is None:
            return arrived, None
        return arrived[:, :-1].contiguous(), arrived[:, -1].contiguous()

    def to_tokens(self, partial_QD: Tensor) -> Tensor:
        """Partial sums are added in the order of the owners' ranks."""
        arrived = self._group.links.all_to_all(partial_QD, self._pairs_in, self._pairs_out, "read")
        total = partial_QD.new_zeros(self._tokens, partial_QD.shape[1])
        # Within one owner a token has one pair: no two terms of an index_add_ meet.
        for part, token in zip(arrived.split(self._pairs_out), self._token_of_pair.split(self._pairs_out), strict=True):
            total.index_add_(0, token, part)
        return total

    def reads_to_tokens(self, value: Tensor) -> Tensor:
        """Back into the places that the reads were taken from."""
        arrived = self._group.links.all_to_all(value, self._reads_in, self._reads_out, "keys")
        placed = torch.empty_like(arrived)
        placed[self._order] = arrived
        return placed.view(self._tokens, self._group.reads_per_token)

    def reads_to_rows(self, value_YP: Tensor) -> Tensor:
        """In the order of the reads."""
        value = value_YP.reshape(-1)[self._order]
        return self._group.links.all_to_all(value, self._reads_out, self._reads_in, "keys")

    @property
    def _tokens(self) -> int:
        return self._order.numel() // self._group.reads_per_token

    def saved(self) -> tuple[Tensor, ...]:
        """Order of the reads, token of each pair, splits."""
        return self._order, self._token_of_pair, self._splits


class SlotGroup(RankGroup):
    """A memory's slots over the ranks of a process group; further arguments as `RankGroup` has them.

    Args:
        group: the ranks
        owners: who owns which slot
        reads_per_token: heads * topk
    """

    def __init__(self, group: dist.ProcessGroup, owners: Owners, reads_per_token: int, **options: Any) -> None:
        super().__init__(group, owners.n_subkeys**2, reads_per_token, **options)
        self.owners = owners
        if owners.ranks != self.size:
            raise ValueError(f"slots are spread over {owners.ranks} ranks but the group has {self.size}")

    def locate(self, slot_YP: Tensor, shape: ChunkShape) -> tuple[Tensor, Tensor]:
        """Owner and row of the slots of this rank's tokens; rows in the type in which they are sent."""
        owner, row = self.owners.locate(self.number(slot_YP, shape))
        return owner, row.to(id_type(self.tables * shape.memories * self.owners.rows))


class ProcessMemoryGroup(SlotGroup):
    """Slots over ranks, in messages of what there is to send."""

    def route(self, slot_YP: Tensor, weight_YP: Tensor, shape: ChunkShape) -> GroupRoute:
        """Send reads to their owners: by owner, then token, then place among the token's reads."""
        owner_YP, row_YP = self.locate(slot_YP, shape)
        tokens, links = slot_YP.shape[0], self.links
        order = torch.sort(owner_YP.reshape(-1), stable=True).indices
        # Reads of each (owner, token) pair; pairs without any are not sent.
        token_YP = torch.arange(tokens, device=slot_YP.device).unsqueeze(1)
        pair_YP = owner_YP * tokens + token_YP
        reads_of_pair = torch.bincount(pair_YP.reshape(-1), minlength=self.size * tokens)
        pair = reads_of_pair.nonzero().view(-1)
        token_of_pair = pair % max(tokens, 1)
        reads_of_pair = reads_of_pair[pair].to(id_type(self.reads_per_token))
        pairs_out = torch.bincount(torch.div(pair, max(tokens, 1), rounding_mode="floor"), minlength=self.size)
        reads_out = torch.bincount(owner_YP.reshape(-1), minlength=self.size)
        counts_out = torch.stack([pairs_out, reads_out], 1)
        counts_in = links.all_to_all_even(counts_out, "plan")
        splits = torch.cat([counts_out.t(), counts_in.t()]).cpu()
        pairs_to, reads_to, pairs_from, reads_from = splits.tolist()
        reads_arrived = links.all_to_all(reads_of_pair, pairs_to, pairs_from, "plan")
        sent = pack(row_YP.reshape(-1)[order], weight_YP.reshape(-1)[order])
        arrived = links.all_to_all(sent, reads_to, reads_from, "plan")
        rows_arrived, weight_arrived = unpack(arrived, row_YP.dtype, weight_YP.dtype)
        offsets = torch.cat([rows_arrived.new_zeros(1), reads_arrived.cumsum(0)])
        plan = plan_slots(rows_arrived, offsets)
        self.traffic.add_chunk(rows_arrived.numel(), plan.slots_U.numel(), self.all_reads(shape))
        return GroupRoute(self, plan, weight_arrived, (order, token_of_pair, splits))

    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...], shape: ChunkShape) -> GroupRoute:
        """A route that was made before."""
        return GroupRoute(self, plan, weight, saved)
