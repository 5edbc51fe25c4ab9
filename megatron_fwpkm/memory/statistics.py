"""Statistics of a memory, gathered during a pass without host synchronization.

Everything stays in small tensors on the memory's device; reading them (`MemoryStatistics.tensors`) is the caller's
choice of moment. Slot use is kept as the distinct slots and counts of each chunk, never as a vector of N numbers.

Over a group of ranks each has its tokens' losses and gates and its own slots' reads: sums are added up, in one exchange
of a few numbers a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from fwpkm_kernels import SlotPlan
from megatron_fwpkm.memory.config import MemoryConfig

GATE_BINS = 10
READ_BINS = 16


class MemoryStatistics:
    """Aggregates of the last call, over all ranks of the group.

    Args:
        config: the memory's settings
        rows: rows of one memory in this rank's table; None: all slots
        group: the ranks that the slots are spread over; None: this one alone

    `tensors()` has:
        gate_mean [], gate_histogram [10] (share of gates in tenths of [0, 1])
        memory_loss [], addressing_loss []
        coverage []: distinct slots read in the call / all slots
        collision_ratio []: share of reads that go to a slot read more than once in the call
        kl_to_uniform []: KL divergence of slot use from uniform use, in nats
        max_reads []: reads of the most read slot
        reads_histogram [16]: slots with 1, 2-3, 4-7, ... reads
    """

    def __init__(self, config: MemoryConfig, rows: int | None = None, group: dist.ProcessGroup | None = None) -> None:
        self.config, self._rows, self._group = config, rows or config.num_slots, group
        self._chunks: list[tuple[Tensor, Tensor]] = []
        self._losses: list[Tensor] = []
        self._addressing_losses: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._first_memory, self._memories = 0, 0
        self._together = False
        self._tensors: dict[str, Tensor] = {}

    def begin_call(self) -> None:
        """Forget what a call that failed may have left."""
        if not self._together:
            self._forget()

    def _forget(self) -> None:
        self._chunks, self._losses, self._addressing_losses, self._gates = [], [], [], []
        self._first_memory = self._memories = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the context several calls, each on memories of its own, count as one call."""
        self._forget()
        self._together = True
        try:
            yield
            self._reduce()
        finally:
            self._together = False

    def add_chunk(self, plan: SlotPlan, memories: int) -> None:
        """Note the slots of one chunk (references, no copies)."""
        self._chunks.append((plan.slots_U + self._first_memory * self._rows, plan.counts_U))
        self._memories = self._first_memory + memories

    def finish_call(self, losses: list[Tensor], addressing_losses: list[Tensor], gate: Tensor | None) -> None:
        """Close a call: reduce what its chunks noted."""
        self._losses += [loss.detach().flatten() for loss in losses]
        self._addressing_losses += addressing_losses
        if gate is not None:
            self._gates.append(gate.detach().flatten())
        self._first_memory = self._memories
        if not self._together:
            self._reduce()

    def _reduce(self) -> None:
        parts: dict[str, Tensor] = {}
        if self._losses:
            losses = torch.cat(self._losses).double()
            parts["losses"] = torch.stack([losses.sum(), losses.new_tensor(losses.numel())])
            addressing = torch.stack(self._addressing_losses).double().mean()
            parts["addressing"] = torch.stack([addressing, torch.ones_like(addressing)])  # a rank's replica's
        if self._gates:
            gates = torch.cat(self._gates).double()
            parts["gates"] = torch.stack([gates.sum(), gates.new_tensor(gates.numel())])
            edges = torch.linspace(0.1, 0.9, GATE_BINS - 1, device=gates.device, dtype=gates.dtype)
            parts["gate_bins"] = _histogram(torch.bucketize(gates, edges, right=True), GATE_BINS)
        largest = None
        if self._chunks:
            of_slots, largest = self._slot_use()
            parts.update(of_slots)
        parts, largest = self._over_ranks(parts, largest)
        tensors: dict[str, Tensor] = {}
        if "losses" in parts:
            total, count = parts["losses"]
            tensors["memory_loss"] = (total / count.clamp_min(1)).float()
            total, count = parts["addressing"]
            tensors["addressing_loss"] = (total / count).float()
        if "gates" in parts:
            total, count = parts["gates"]
            tensors["gate_mean"] = (total / count.clamp_min(1)).float()
            tensors["gate_histogram"] = (parts["gate_bins"] / count.clamp_min(1)).float()
        if largest is not None:
            used, reads, repeated, information = parts["slots"]
            num_slots = self.config.num_slots * self._memories
            tensors["coverage"] = (used / num_slots).float()
            tensors["collision_ratio"] = (repeated / reads).float()
            # sum of share log(share N) with share = reads of the slot / all reads
            tensors["kl_to_uniform"] = (information / reads - torch.log(reads / num_slots)).float()
            tensors["max_reads"] = largest.long()
            tensors["reads_histogram"] = parts["read_bins"].long()
        self._forget()
        self._tensors = tensors

    def _over_ranks(self, parts: dict[str, Tensor], largest: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Sums, and the largest of the largest, over the group."""
        if self._group is None or not parts:
            return parts, largest
        own = torch.cat([*parts.values(), *([] if largest is None else [largest.view(1)])])
        ranks = own.new_empty(dist.get_world_size(self._group), own.numel())
        dist.all_gather_into_tensor(ranks.view(-1), own, group=self._group)
        sums = ranks.sum(0).split([*(part.numel() for part in parts.values()), *([] if largest is None else [1])])
        summed = dict(zip(parts, sums, strict=False))
        return summed, None if largest is None else ranks[:, -1].amax()

    def _slot_use(self) -> tuple[dict[str, Tensor], Tensor]:
        """Sums over this rank's slots, as float64, and the reads of the most read one."""
        slots = torch.cat([slots for slots, _ in self._chunks])
        counts = torch.cat([counts for _, counts in self._chunks])
        ordered, order = torch.sort(slots)
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        # Totals per distinct slot stand at its first place; other places hold 0 (a fixed size needs no host sync).
        totals = torch.zeros_like(counts).index_add_(0, torch.cumsum(first, 0) - 1, counts[order]).double()
        used = totals > 0
        information = (totals * torch.log(totals.clamp_min(1))).sum()
        sums = torch.stack([used.sum(), totals.sum(), totals.where(totals > 1, 0).sum(), information])
        level = torch.floor(torch.log2(totals.clamp_min(1))).long().clamp_max(READ_BINS - 1)
        histogram = _histogram(level.where(used, READ_BINS), READ_BINS)
        # A rank may have none.
        return {"slots": sums, "read_bins": histogram}, torch.cat([totals, totals.new_zeros(1)]).amax()

    def tensors(self) -> dict[str, Tensor]:
        """The last call's statistics, on the memory's device."""
        return dict(self._tensors)


def _histogram(bins: Tensor, number: int) -> Tensor:
    """float64 [number]: how many of `bins` are 0, 1, ...; others are not counted."""
    return (bins.unsqueeze(-1) == torch.arange(number, device=bins.device)).flatten(0, -2).sum(0).double()
