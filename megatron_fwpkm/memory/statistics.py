"""Statistics of a memory, gathered during a pass without host synchronization.

Everything stays in small tensors on the memory's device; reading them (`MemoryStatistics.tensors`) is the caller's
choice of moment. Slot use is kept as the distinct slots and counts of each chunk, never as a vector of N numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fwpkm_kernels import SlotPlan
from megatron_fwpkm.memory.config import MemoryConfig

GATE_BINS = 10


class MemoryStatistics:
    """Aggregates of the last call.

    `tensors()` has:
        gate_mean [], gate_histogram [10] (share of gates in tenths of [0, 1])
        memory_loss [], addressing_loss []
        coverage []: distinct slots read in the call / all slots
        collision_ratio []: share of reads that go to a slot read more than once in the call
        kl_to_uniform []: KL divergence of slot use from uniform use, in nats
        max_reads []: reads of the most read slot
        reads_histogram [16]: slots with 1, 2-3, 4-7, ... reads
    """

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
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
        self._chunks.append((plan.slots_U + self._first_memory * self.config.num_slots, plan.counts_U))
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
        tensors: dict[str, Tensor] = {}
        if self._losses:
            total = torch.cat(self._losses)
            tensors["memory_loss"] = total.mean() if total.numel() else total.sum()
            tensors["addressing_loss"] = torch.stack(self._addressing_losses).mean()
        gate = torch.cat(self._gates) if self._gates else None
        if gate is not None and gate.numel():
            tensors["gate_mean"] = gate.mean()
            edges = torch.linspace(0.1, 0.9, GATE_BINS - 1, device=gate.device, dtype=gate.dtype)
            bins = torch.bucketize(gate, edges, right=True)
            ranks = torch.arange(GATE_BINS, device=gate.device)
            tensors["gate_histogram"] = (bins.unsqueeze(1) == ranks).sum(0) / gate.numel()
        if self._chunks:
            tensors.update(self._slot_use())
        self._forget()
        self._tensors = tensors

    def _slot_use(self) -> dict[str, Tensor]:
        slots = torch.cat([slots for slots, _ in self._chunks])
        counts = torch.cat([counts for _, counts in self._chunks])
        ordered, order = torch.sort(slots)
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        # Totals per distinct slot stand at its first place; other places hold 0 (a fixed size needs no host sync).
        totals = torch.zeros_like(counts).index_add_(0, torch.cumsum(first, 0) - 1, counts[order])
        reads = totals.sum()
        share = (totals / reads).clamp_min(torch.finfo(torch.float32).tiny)
        num_slots = self.config.num_slots * self._memories
        level = torch.floor(torch.log2(totals.clamp_min(1).float())).long().clamp_max(15)
        ranks = torch.arange(16, device=totals.device)
        used = totals > 0
        return {
            "coverage": used.sum() / num_slots,
            "collision_ratio": totals.where(totals > 1, 0).sum() / reads,
            "kl_to_uniform": (share * torch.log(share * num_slots)).where(used, 0).sum(),
            "max_reads": totals.max(),
            "reads_histogram": ((level.unsqueeze(1) == ranks) & used.unsqueeze(1)).sum(0),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The last call's statistics, on the memory's device."""
        return dict(self._tensors)
