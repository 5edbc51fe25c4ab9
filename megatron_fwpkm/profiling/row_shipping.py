"""Naive row shipping, to measure the memory's own exchanges against: rows come to the tokens, not tokens to the rows.

Every rank fetches the distinct rows that its tokens read, computes with its copies, and sends one summed change for
each back to the owner; in the backward pass the rows' gradients go the same ways. A real implementation on the memory's
own mathematics, for one memory of one replica, without weight decay or clamp. No training uses it.

Letters: as in memory/routing.py; U distinct rows that this rank's tokens read, F rows that other ranks fetch here (of
each rank its distinct ones), W distinct rows among these.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels import SlotPlan, plan_slots, scatter_weighted_add
from megatron_fwpkm.memory.backward import CallBackward, CallContext
from megatron_fwpkm.memory.chunk import ChunkRead, ChunkSpan
from megatron_fwpkm.memory.exchange import id_type
from megatron_fwpkm.memory.fast_state import FastState
from megatron_fwpkm.memory.functional import _forward_chunk
from megatron_fwpkm.memory.routing import ChunkShape, LocalRoute
from megatron_fwpkm.memory.sharding import SlotGroup
from megatron_fwpkm.memory.traffic import Phase


@dataclass
class Fetch:
    """Which rows of a chunk this rank fetches, and which are fetched here.

    Attributes:
        order_U: the plan's rows in the order of their owners
        splits: numbers [R] of rows that are fetched from each rank, and by each
        served: the rows that are fetched here, as slots with one read a row
    """

    order_U: Tensor
    splits: Tensor
    served: SlotPlan

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """Rows fetched from each rank, and by each."""
        fetched, served = self.splits.tolist()
        return fetched, served


class FetchedRoute(LocalRoute):
    """Reads stay where their tokens are; remembers what was fetched."""

    def __init__(self, plan: SlotPlan, weight: Tensor, fetch: Fetch) -> None:
        super().__init__(plan, weight)
        self.fetch = fetch

    def saved(self) -> tuple[Tensor, ...]:
        """What `RowShippingGroup.restore` makes the fetch of again."""
        plan = self.fetch.served
        order, offsets = plan.segments.order, plan.segments.offsets
        return self.fetch.order_U, self.fetch.splits, plan.slots_U, plan.inverse_XP, plan.counts_U, order, offsets


class RowShippingGroup(SlotGroup):
    """Ranks that own slots and send copies of their rows; arguments as `SlotGroup` has them.

    Raises:
        ValueError: replicas.
    """

    fetch: Fetch
    """Of the chunk that is at work."""

    def route(self, slot_YP: Tensor, weight_YP: Tensor, shape: ChunkShape) -> FetchedRoute:
        """Ask owners for rows: how many, which, and how often they are read here; all reads of them come back."""
        plan = plan_slots(slot_YP)
        owner_U, row_U = self.locate(plan.slots_U, shape)
        order_U = torch.sort(owner_U, stable=True).indices
        counts_out = torch.bincount(owner_U, minlength=self.size)
        counts_in = self.links.all_to_all_even(counts_out, "plan")
        splits = torch.stack([counts_out, counts_in]).cpu()
        fetched, served = splits.tolist()
        rows_F = self.links.all_to_all(row_U[order_U], fetched, served, "plan")
        number_type = id_type(self.all_reads(shape))
        reads_F = self.links.all_to_all(plan.counts_U[order_U].to(number_type), fetched, served, "plan")
        plan_F = plan_slots(rows_F.long().unsqueeze(1))
        reads_W = torch.zeros_like(plan_F.counts_U).index_add_(0, plan_F.inverse_XP.view(-1), reads_F.long())
        all_reads_F = reads_W[plan_F.inverse_XP.view(-1)].to(number_type)
        counts_U = torch.empty_like(plan.counts_U)
        counts_U[order_U] = self.links.all_to_all(all_reads_F, served, fetched, "plan").long()
        self.traffic.add_chunk(int(reads_F.sum()), plan_F.slots_U.numel(), self.all_reads(shape))
        self.fetch = Fetch(order_U, splits, plan_F)
        return FetchedRoute(replace(plan, counts_U=counts_U), weight_YP, self.fetch)

    def restore(self, plan: SlotPlan, weight: Tensor, saved: tuple[Tensor, ...], shape: ChunkShape) -> FetchedRoute:
        """A route that was made before."""
        order_U, splits, slots_U, inverse_XP, counts_U, order, offsets = saved
        segments = replace(plan.segments, order=order, offsets=offsets, pairs=1)
        self.fetch = Fetch(order_U, splits, SlotPlan(slots_U, inverse_XP, counts_U, segments))
        return FetchedRoute(plan, weight, self.fetch)

    def fetch_rows(self, rows_WD: Tensor, phase: Phase) -> Tensor:
        """[U, D] from what each rank has of its rows that are fetched."""
        fetched, served = self.fetch.counts
        sent_FD = rows_WD.index_select(0, self.fetch.served.inverse_XP.view(-1))
        arrived_UD = self.links.all_to_all(sent_FD, served, fetched, phase)
        return torch.empty_like(arrived_UD).index_copy_(0, self.fetch.order_U, arrived_UD)

    def return_rows(self, change_UD: Tensor, phase: Phase) -> Tensor:
        """[W, D]: what all ranks have found for the rows that are fetched here, added in the order of the ranks."""
        fetched, served = self.fetch.counts
        arrived_FD = self.links.all_to_all(change_UD.index_select(0, self.fetch.order_U), fetched, served, phase)
        ones = arrived_FD.new_ones(arrived_FD.shape[0], 1)
        return scatter_weighted_add(self.fetch.served.segments, arrived_FD, ones)


class FetchedView:
    """The memory as one rank sees it: its reads fetch rows, its writes return changes."""

    memories = tables = 1

    def __init__(self, state: FastState, group: RowShippingGroup) -> None:
        self.state, self.group = state, group
        self.num_slots = state.config.num_slots

    @property
    def keys_MH2nd(self) -> Tensor:
        """The sub-keys, which every rank has."""
        return self.state.keys_MH2nd

    def call(self) -> AbstractContextManager[None]:
        """As the state's."""
        return self.state.call()

    def read_rows(self, slots_U: Tensor) -> Tensor:
        """Copies [U, D] of the rows of the chunk at work."""
        return self.group.fetch_rows(self.state.read_rows(self.group.fetch.served.slots_U), "read")

    def write_rows(self, slots_U: Tensor, before_UD: Tensor, change_UD: Tensor, decay: float) -> None:
        """Changes go to the owners of the rows."""
        change_WD = self.group.return_rows(change_UD, "write")
        slots_W = self.group.fetch.served.slots_U
        self.state.write_rows(slots_W, self.state.read_rows(slots_W), change_WD, decay)

    def write_keys(self, keys_MH2nd: Tensor) -> None:
        """The same on every rank."""
        self.state.write_keys(keys_MH2nd)


class ShippedCall:
    """One call with row shipping: `forward`, then `backward`. Arguments as those of `fast_memory`.

    Raises:
        ValueError: weight decay or a clamp, which work on whole sums of a row.
    """

    def __init__(self, state: FastState, group: RowShippingGroup, spans: list[ChunkSpan]) -> None:
        if state.config.weight_decay or state.config.gradient_clip:
            raise ValueError("row shipping is measured without weight_decay and gradient_clip")
        view = FetchedView(state, group)
        self.call = CallContext(view, state.config, None, None, True, group, spans)
        self.call.keys_shape = view.keys_MH2nd.shape

    @torch.no_grad()
    def forward(self, query: Tensor, target: Tensor, gate: Tensor | None, mask: Tensor | None) -> Tensor:
        """Reads [B, T, D]; writes the memory."""
        reads: list[Tensor] = []
        saved: list[Tensor | None] = []
        with self.call.view.call():
            for span in self.call.spans:
                gate_BC, mask_BC = (None if t is None else t[:, span.tokens] for t in (gate, mask))
                part = (query[:, span.queries], target[:, span.targets], gate_BC, mask_BC)
                read, tensors, _, _ = _forward_chunk(part, span, self.call)
                reads.append(read.read_YD.view(query.shape[0], span.own_length, target.shape[2]))
                saved.extend(tensors)
        output = torch.cat(reads, 1)
        self.saved: Any = (query, target, gate, mask, output, saved)
        return output

    @torch.no_grad()
    def backward(self, output_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of query, target and gate."""
        with self.call.group.backward_pass():
            return _ShippedBackward(self.call, *self.saved).run(output_gradient)


class _ShippedBackward(CallBackward):
    """The backward pass where the gradients of rows are kept by their owners."""

    def __init__(self, call: CallContext, *arguments: Any) -> None:
        super().__init__(call, *arguments)
        assert isinstance(call.group, RowShippingGroup)
        self.group = call.group
        slots = [tensors["route"][2] for tensors in self.saved]
        self.slots, position = torch.unique(torch.cat(slots), return_inverse=True)
        self.positions = position.split([s.numel() for s in slots])
        self.row_gradient = self.output.new_zeros(self.slots.numel(), self.output.shape[-1])

    def _rows_after_write(self, index: int) -> Tensor:
        return self.group.fetch_rows(super()._rows_after_write(index), "read")

    def _add_row_gradient(
        self, index: int, read: ChunkRead, gradient_QD: Tensor, extra_UD: Tensor | None, decay: float
    ) -> None:
        change_UD = scatter_weighted_add(read.plan.segments, gradient_QD, read.route.weight)
        if extra_UD is not None:
            change_UD += extra_UD
        self.row_gradient.index_add_(0, self.positions[index], self.group.return_rows(change_UD, "write"))
