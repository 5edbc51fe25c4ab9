"""The backward pass of one call of the memory (semantics B): chunks in reverse, over the rows that the call touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels import ProductKeyTopk, Segments, SlotPlan, gather_dot, scatter_weighted_add
from megatron_fwpkm.memory import addressing, chunk
from megatron_fwpkm.memory.addressing import Address, Usage
from megatron_fwpkm.memory.chunk import ChunkRead, ChunkSpan, ChunkWrite
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import MemoryView
from megatron_fwpkm.memory.routing import ChunkShape, MemoryGroup
from megatron_fwpkm.memory.statistics import MemoryStatistics


@dataclass
class MemoryTrace:
    """What a call leaves beside its output, on request; all detached.

    Attributes:
        losses: [B, pairs] memory losses at their query positions
        addressing_loss: [] mean over chunks and memories
        slots_BTHK, weights_BTHK: slots read (without the memory's number) and their weights
        gate_BT: gates, if there are any
        memory_gradient: after the backward pass, gradients with respect to the memory at the start of the call
    """

    losses: Tensor | None = None
    addressing_loss: Tensor | None = None
    slots_BTHK: Tensor | None = None
    weights_BTHK: Tensor | None = None
    gate_BT: Tensor | None = None
    memory_gradient: MemoryGradient | None = None


@dataclass
class MemoryGradient:
    """Gradient with respect to the memory before the call: keys [M, H, 2, n, d]; rows [U, D] of slots [U]."""

    keys_MH2nd: Tensor
    slots_U: Tensor
    rows_UD: Tensor

    def values_ND(self, num_slots: int) -> Tensor:
        """Dense [M * N, D], for tests."""
        dense = self.rows_UD.new_zeros(self.keys_MH2nd.shape[0] * num_slots, self.rows_UD.shape[1])
        return dense.index_copy_(0, self.slots_U, self.rows_UD)


@dataclass
class CallContext:
    """Constants of one call, and where its by-products go."""

    view: MemoryView
    config: MemoryConfig
    statistics: MemoryStatistics | None
    trace: MemoryTrace | None
    keep_graph: bool
    group: MemoryGroup
    spans: list[ChunkSpan]
    decays: list[float] = field(default_factory=list)
    keys_shape: torch.Size = field(default_factory=torch.Size)

    def shape(self, batch: int, span: ChunkSpan) -> ChunkShape:
        """A chunk as all ranks know it."""
        return ChunkShape(batch, span.length, self.keys_shape[0])


# Tensors saved for each chunk, in order, and then the route's own. The clamp masks are there only with the clamp, those
# of the row side only where it is another than the token side.
SAVED_TENSORS = (
    *("keys", "sub_index", "sub_score", "rank", "slot_score", "weight"),
    *("slots", "inverse", "counts", "order", "offsets", "rows"),
    *("step", "write_weight", "unclipped_rows", "unclipped_keys", "mean_usage"),
    *("row_queries", "row_offsets", "row_weight", "row_write_weight", "row_error"),
)


def chunk_queries(query_BCHk: Tensor, memories: int) -> Tensor:
    """[B, C, H, k] of a chunk to halves [G, X, d]."""
    per_memory = query_BCHk.shape[0] // memories * query_BCHk.shape[1]  # may be 0: no place for a -1
    return addressing.split_queries(query_BCHk.reshape(memories, per_memory, *query_BCHk.shape[2:]))


def _either(saved: Any, otherwise: Any) -> Any:
    return otherwise if saved is None else saved


class CallBackward:
    """The backward pass of one call: chunks in reverse, over the rows that the call touched."""

    def __init__(
        self,
        call: CallContext,
        query: Tensor,
        target: Tensor,
        gate: Tensor | None,
        mask: Tensor | None,
        output: Tensor,
        saved: list[Tensor | None],
    ) -> None:
        self.call, self.config, self.memories = call, call.config, call.keys_shape[0]
        self.query, self.target, self.gate, self.mask, self.output = query, target, gate, mask, output
        width = len(saved) // len(call.spans)
        self.saved: list[dict[str, Any]] = []
        for first in range(0, len(saved), width):
            of_chunk = saved[first : first + width]
            route = tuple(of_chunk[len(SAVED_TENSORS) :])
            self.saved.append({**dict(zip(SAVED_TENSORS, of_chunk, strict=False)), "route": route})
        # One compact table for the gradients of all rows of the call.
        slots = [tensors["slots"] for tensors in self.saved]
        self.slots, position = torch.unique(torch.cat(slots), return_inverse=True)
        self.positions = position.split([s.numel() for s in slots])
        self.row_gradient = output.new_zeros(self.slots.numel(), output.shape[-1])
        # With weight decay a row's gradient shrinks at every chunk: applied when the row is next used.
        self.row_stamp = torch.full((self.slots.numel(),), len(self.saved), device=output.device)
        self.key_gradient: Tensor | None = None

    def run(self, output_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of query, target and gate."""
        of_query = torch.empty_like(self.query)
        of_target = torch.zeros_like(self.target)
        of_gate = None if self.gate is None else torch.zeros_like(self.gate)
        for index in range(len(self.saved) - 1, -1, -1):
            self._chunk(index, output_gradient, of_query, of_target, of_gate)
        if self.call.trace is not None:
            self._report_memory_gradient()
        if of_gate is not None and self.config.weigh_write_by_gate:
            of_gate = self.call.group.sum_columns(of_gate)
        return of_query, of_target, of_gate

    def _rebuild(self, index: int) -> tuple[ChunkRead, ChunkWrite, ChunkSpan]:
        """The chunk's read and write from what was saved; cheap parts are computed again."""
        span, tensors = self.call.spans[index], self.saved[index]
        top = ProductKeyTopk(
            tensors["sub_index"], tensors["sub_score"], tensors["rank"], tensors["slot_score"], tensors["slot_score"]
        )
        queries = _either(tensors["row_queries"], tensors["inverse"].shape[-1])
        segments = Segments(tensors["order"], tensors["offsets"], queries)
        plan = SlotPlan(tensors["slots"], tensors["inverse"], tensors["counts"], segments, tensors["row_offsets"])
        weight, shape = _either(tensors["row_weight"], tensors["weight"]), self.call.shape(self.query.shape[0], span)
        route = self.call.group.restore(plan, weight, tensors["route"], shape)
        read_BCD = self.output[:, span.tokens]
        query = chunk_queries(self.query[:, span.queries], self.memories)
        # Nobody asks for the slots' numbers any more.
        address = Address(query, top, tensors["inverse"], tensors["weight"])
        read = ChunkRead(address, route, tensors["rows"], read_BCD.flatten(0, 1))
        error = chunk.lookahead_errors(read_BCD, self.target[:, span.targets]).flatten(0, 1)
        write = ChunkWrite(
            tensors["write_weight"],
            error,
            _either(tensors["row_write_weight"], tensors["write_weight"]),
            _either(tensors["row_error"], error),
            tensors["step"],
            tensors["unclipped_rows"],
            self.call.decays[index],
        )
        return read, write, span

    def _chunk(
        self, index: int, output_gradient: Tensor, of_query: Tensor, of_target: Tensor, of_gate: Tensor | None
    ) -> None:
        config, last = self.config, index == len(self.saved) - 1
        read, write, span = self._rebuild(index)
        memories = self.memories
        pairs = chunk.sequences(output_gradient.shape[0], memories, self.call.group) * span.pairs
        gradient_YD = output_gradient[:, span.tokens].flatten(0, 1)
        error_gradient = torch.zeros_like(gradient_YD)
        weight_gradient, slot_weight = torch.zeros_like(write.weight_Y), torch.zeros_like(read.route.weight)
        key_result = None
        extra_rows = None
        if not last:  # the last chunk's write changes nothing that this call outputs
            rows = self._rows_after_write(index)
            gradient_YD, error_gradient, weight_gradient, slot_weight = chunk.backward_values(
                read, write, gradient_YD, rows, config
            )
            key_result = self._keys(index, read, write, span, pairs)
            if key_result is not None and key_result.memory is not None:
                of_error, of_weight, extra_rows = key_result.memory
                gradient_YD = gradient_YD + of_error
                error_gradient = error_gradient + of_error
                weight_gradient = weight_gradient + of_weight
        gradient_QD, _ = read.route.to_rows(gradient_YD)
        slot_weight = slot_weight + gather_dot(read.rows_UD, read.plan.inverse_XP, gradient_QD, read.plan.offsets_X)
        self._add_row_gradient(index, read, gradient_QD, extra_rows, write.decay)
        slot_weight_YP = read.route.reads_to_tokens(slot_weight)
        score = addressing.heads_last(read.address.top.score, memories)
        of_score = addressing.score_gradient_from_weights(read.address.weight_YP, score, slot_weight_YP, config)
        by_head = addressing.heads_first(of_score, memories, config.heads)
        self._queries_and_keys(index, read, by_head, key_result, of_query[:, span.queries])
        self._targets_and_gates(span, error_gradient, weight_gradient, of_target, of_gate)

    def _rows_after_write(self, index: int) -> Tensor:
        """dL/d of the chunk's rows after its write."""
        position = self.positions[index]
        rows = self.row_gradient.index_select(0, position)
        decay = self.call.decays[index]
        if decay != 1:
            chunks = self.row_stamp[position] - (index + 1)
            rows.mul_(torch.pow(torch.tensor(decay, dtype=torch.float64), chunks).to(rows.dtype).unsqueeze(1))
        return rows

    def _add_row_gradient(
        self, index: int, read: ChunkRead, gradient_QD: Tensor, extra_UD: Tensor | None, decay: float
    ) -> None:
        """Row gradients before the chunk: decayed, plus what the chunk's reads contribute."""
        position = self.positions[index]
        change = scatter_weighted_add(read.plan.segments, gradient_QD, read.route.weight)
        if extra_UD is not None:
            change += extra_UD
        if decay == 1:
            self.row_gradient.index_add_(0, position, change)
            return
        self.row_gradient.index_copy_(0, position, self._rows_after_write(index).mul_(decay).add_(change))
        self.row_stamp[position] = index

    def _keys(self, index: int, read: ChunkRead, write: ChunkWrite, span: ChunkSpan, pairs: int) -> _KeyBackward | None:
        """Backward of the sub-keys' step.

        `key_gradient` becomes what passes the step as it is, the same on all ranks; what this rank's tokens add to it
        waits in the result.
        """
        config, memories, tensors = self.config, self.memories, self.saved[index]
        after, decay = self.key_gradient, self.call.decays[index]
        if after is None:
            return None
        if not config.moves_keys:
            self.key_gradient = after * decay
            return None
        cotangent = after * -config.learning_rate
        if tensors["unclipped_keys"] is not None:
            cotangent = cotangent * tensors["unclipped_keys"]
        address, keys = read.address, tensors["keys"].flatten(0, 2)
        tokens = chunk.sequences(self.query.shape[0], memories, self.call.group) * span.length
        usage = Usage(address.top, memories, tokens, config, self.call.group, tensors["mean_usage"])
        slope = None if config.values_only else chunk.memory_slope(read, write, pairs, config)
        inner = chunk.inner_score_gradient(usage, read, slope, memories, config)
        plan = addressing.plan_subkeys(address.top, config.n_subkeys)
        step = addressing.key_gradient_backward(address.query_GXd, keys, address.top, plan, inner, cotangent, config)
        self.key_gradient = after * decay
        result = _KeyBackward(plan, step.query_GXd, step.sub_score_GXK, step.keys_Gnd)
        if config.has_addressing_loss:
            result.add_score(usage.score_gradient_backward(step.cotangent_GXK))
        if slope is not None and pairs:
            self._memory_loss_of_keys(read, write, slope, step.cotangent_GXK, pairs, result)
        return result

    def _memory_loss_of_keys(
        self,
        read: ChunkRead,
        write: ChunkWrite,
        slope: Tensor,
        cotangent_GXK: Tensor,
        pairs: int,
        result: _KeyBackward,
    ) -> None:
        """Second-order terms of values_only=False: the sub-keys' step depends on the weights, errors and rows."""
        config, memories, address = self.config, self.memories, read.address
        halves = cotangent_GXK.unflatten(0, (-1, 2))
        by_head = halves[:, 0].gather(-1, address.top.rank[0]) + halves[:, 1].gather(-1, address.top.rank[1])
        of_score, of_slope = addressing.second_order_through_weights(
            address.weight_YP,
            addressing.heads_last(address.top.score, memories),
            slope,
            addressing.heads_last(by_head, memories),
            config,
        )
        result.slot_score_GXK = addressing.heads_first(of_score, memories, config.heads)
        if config.key_gradient == "exact":
            result.memory = chunk.backward_memory_slope(read, write, of_slope, pairs, config)

    def _queries_and_keys(
        self, index: int, read: ChunkRead, slot_score_GXK: Tensor, step: _KeyBackward | None, of_query: Tensor
    ) -> None:
        """Queries' gradients, and the sub-keys' before the chunk, from the scores' gradients."""
        config, address = self.config, read.address
        keys = self.saved[index]["keys"].flatten(0, 2)
        if step is not None and step.slot_score_GXK is not None:
            slot_score_GXK = slot_score_GXK + step.slot_score_GXK
        of_score = addressing.spread_to_subkeys(slot_score_GXK, address.top)
        if step is not None and step.sub_score_GXK is not None:
            of_score = of_score + step.sub_score_GXK
        plan = step.plan if step is not None else addressing.plan_subkeys(address.top, config.n_subkeys)
        of_query_GXd = addressing.query_gradient(address.query_GXd, keys, address.top, plan, of_score, config)
        if step is not None:
            of_query_GXd += step.query_GXd
        of_query.copy_(addressing.merge_queries(of_query_GXd, self.memories).reshape(of_query.shape))
        if (index == 0 or not config.moves_keys) and self.call.trace is None:
            return  # nobody asks for the gradient of the memory at the start, or no write before has moved sub-keys
        of_keys = addressing.key_gradient(address.query_GXd, keys, address.top, plan, of_score, config)
        if step is not None and step.keys_Gnd is not None:
            of_keys = step.keys_Gnd.add_(of_keys)
        of_keys = self.call.group.sum(of_keys)
        self.key_gradient = of_keys if self.key_gradient is None else of_keys.add_(self.key_gradient)

    def _targets_and_gates(
        self,
        span: ChunkSpan,
        error_gradient: Tensor,
        weight_gradient: Tensor,
        of_target: Tensor,
        of_gate: Tensor | None,
    ) -> None:
        batch, pairs = of_target.shape[0], span.own_pairs
        of_target[:, span.targets] = -error_gradient.view(batch, span.own_length, of_target.shape[2])[:, :pairs]
        if of_gate is not None and self.config.weigh_write_by_gate:
            gate = weight_gradient.view(batch, span.own_length)[:, :pairs]
            if self.mask is not None:
                gate = gate * self.mask[:, span.tokens][:, :pairs]
            of_gate[:, span.tokens][:, :pairs] = gate

    def _report_memory_gradient(self) -> None:
        assert self.call.trace is not None and self.key_gradient is not None
        rows = self.row_gradient
        decay = self.call.decays[0]
        if decay != 1:
            rows = rows * (torch.tensor(decay, dtype=torch.float64) ** self.row_stamp).to(rows.dtype).unsqueeze(1)
        self.call.trace.memory_gradient = MemoryGradient(self.key_gradient.view(self.call.keys_shape), self.slots, rows)


@dataclass
class _KeyBackward:
    """What the sub-keys' step contributes to the gradients of its chunk."""

    plan: addressing.SubkeyPlan
    query_GXd: Tensor
    sub_score_GXK: Tensor | None
    keys_Gnd: Tensor | None = None  # of the sub-keys before the step, directly
    slot_score_GXK: Tensor | None = None
    memory: tuple[Tensor, Tensor, Tensor] | None = None  # of the errors, write weights and rows

    def add_score(self, gradient_GXK: Tensor) -> None:
        """Add to dL/d sub-score."""
        self.sub_score_GXK = gradient_GXK if self.sub_score_GXK is None else self.sub_score_GXK + gradient_GXK
