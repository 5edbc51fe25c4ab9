"""The memory over one call: chunks in order forward, in reverse order backward, as one autograd function.

Self-contained per call: everything that the backward pass needs is saved as touched rows and small tensors, so later
calls may write to the memory before this call's backward runs (pipeline schedules do). No gradient flows into an
earlier call: the memory at the start is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fwpkm.memory import chunk
from megatron_fwpkm.memory.addressing import Address
from megatron_fwpkm.memory.backward import CallBackward, CallContext, MemoryGradient, MemoryTrace, chunk_queries
from megatron_fwpkm.memory.chunk import ChunkRead, ChunkSpan, chunk_bounds, chunk_span
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import MemoryView
from megatron_fwpkm.memory.inputs import Expected, check_inputs
from megatron_fwpkm.memory.routing import LOCAL, MemoryGroup
from megatron_fwpkm.memory.statistics import MemoryStatistics
from megatron_fwpkm.phase import PHASE

__all__ = ["MemoryGradient", "MemoryTrace", "chunk_bounds", "fast_memory"]


def chunk_spans(tokens: int, config: MemoryConfig) -> list[ChunkSpan]:
    """The chunks of a sequence that is whole on this rank."""
    return [chunk_span(start, end, config.lookahead) for start, end in chunk_bounds(tokens, config)]


def fast_memory(
    query_BTHk: Tensor,
    target_BTD: Tensor,
    gate_BT: Tensor | None,
    mask_BT: Tensor | None,
    view: MemoryView,
    config: MemoryConfig,
    *,
    statistics: MemoryStatistics | None = None,
    trace: MemoryTrace | None = None,
    group: MemoryGroup = LOCAL,
    spans: list[ChunkSpan] | None = None,
) -> Tensor:
    """Read and write a memory, chunk after chunk; returns the reads [B, T, D] (semantics A, gradients as B).

    Shapes: query [B, T, H, k_dim]; target [B, T, D], every token's own value (the lookahead shift happens inside);
    gate [B, T] or None; mask [B, T] bool or None. The view has one memory for the batch or one for each sequence.
    When a call fails, what it wrote to the fast state is taken back.

    Over a `group` of ranks each has its tokens of every chunk, and `spans` say which (`sharding.token_share`): `target`
    then holds the targets of those tokens, in their order. All ranks of the group call this together, with statistics
    and a trace on all or on none. Ranks of several replicas have batches of one shape, and each its own.

    With columns spread over the group query is that of this rank's tokens [B, own, H, k_dim], but gate and mask [B, T]
    are those of all tokens, the same on all ranks; target [B, pairs, D / R] and the result [B, T, D / R] have all
    tokens in this rank's columns. The gate's gradient then is whole on every rank, to be used once.

    Computes in the memory's dtype whatever the inputs' dtype and autocast; the result has the target's dtype.

    Raises:
        ValueError: wrong shapes or dtypes; with `check_finite`, NaN or infinity in an input.
        RuntimeError: called while a backward pass runs, as activation checkpointing does: that would write twice.
    """
    if spans is None:
        tokens = query_BTHk.shape[1]
        spans, expected = chunk_spans(tokens, config), Expected(tokens, tokens, tokens, config.v_dim, group)
    else:
        expected = Expected.of(spans, config, group)
    check_inputs(query_BTHk, target_BTD, gate_BT, mask_BT, view, config, expected)
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the memory was called inside a backward pass, as activation checkpointing does to recompute: it would "
            "write twice. Leave memory layers out of checkpointed regions"
        )
    if query_BTHk.shape[0] == 0 or not any(span.length for span in spans):
        return target_BTD.clone()  # as empty as the result
    dtype = view.keys_MH2nd.dtype
    if statistics is not None:
        statistics.begin_call()
    with view.call(), torch.autocast(query_BTHk.device.type, enabled=False):
        query, target = query_BTHk.to(dtype), target_BTD.to(dtype)
        gate = None if gate_BT is None else gate_BT.to(dtype)
        keep_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, target, gate))
        call = CallContext(view, config, statistics, trace, keep_graph, group, spans)
        read_BTD = _FastMemory.apply(query, target, gate, mask_BT, call)
    return read_BTD.to(target_BTD.dtype)


class _FastMemory(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, target: Tensor, gate: Tensor | None, mask: Tensor | None, call: CallContext
    ) -> Tensor:
        reads: list[Tensor] = []
        saved: list[Tensor | None] = []
        losses: list[Tensor] = []
        addressing_losses: list[Tensor] = []
        traced: list[Address] = []
        call.keys_shape = call.view.keys_MH2nd.shape
        for span in call.spans:
            gate_BC, mask_BC = (None if t is None else t[:, span.tokens] for t in (gate, mask))
            part = (query[:, span.queries], target[:, span.targets], gate_BC, mask_BC)
            read, tensors, loss, addressing_loss = _forward_chunk(part, span, call)
            reads.append(read.read_YD.view(query.shape[0], span.own_length, target.shape[2]))
            losses.append(loss)
            addressing_losses.append(addressing_loss)
            if call.keep_graph:
                saved.extend(tensors)
            if call.trace is not None:
                traced.append(read.address)
        output = torch.cat(reads, 1)
        if call.statistics is not None or call.trace is not None:
            losses = [call.group.sum_columns(torch.cat(losses, 1))]
        if call.statistics is not None:
            call.statistics.finish_call(losses, addressing_losses, gate)
        if call.trace is not None and reads:
            _fill_trace(call.trace, traced, losses, addressing_losses, query.shape[0], call.config)
            call.trace.gate_BT = gate
        ctx.call, ctx.place = call, PHASE.place
        if call.keep_graph:
            ctx.save_for_backward(query, target, gate, mask, output, *saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, target, gate, mask, output, *saved = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False), ctx.call.group.backward_pass(), PHASE.at(ctx.place):
            gradients = CallBackward(ctx.call, query, target, gate, mask, output, saved).run(output_gradient)
        return (*gradients, None, None)


def _forward_chunk(
    part: tuple[Tensor, Tensor, Tensor | None, Tensor | None], span: ChunkSpan, call: CallContext
) -> tuple[ChunkRead, list[Tensor | None], Tensor, Tensor]:
    """Read and write one chunk. Returns the read, what backward needs, losses [B, pairs] and the addressing loss.

    Where columns are spread over ranks the losses are the terms of this rank's columns.
    """
    query, target, gate, mask = part
    view, config, group = call.view, call.config, call.group
    batch, memories = query.shape[0], view.memories
    sequences = chunk.sequences(batch, memories, group)
    keys = view.keys_MH2nd
    read = chunk.read_chunk(chunk_queries(query, memories), view, config, group, call.shape(batch, span))
    read_BCD = read.read_YD.view(batch, span.own_length, target.shape[2])
    error = chunk.lookahead_errors(read_BCD, target).flatten(0, 1)
    weight = chunk.write_weights(gate, mask, read_BCD, span.own_pairs, config)
    loss_BC = (weight.flatten() * (error.square().sum(1) / config.v_dim)).view(batch, span.own_length)
    scale = chunk.write_scale(mask, batch, span, view.memories, config, group)
    step = chunk.row_steps(read.plan, scale, error.dtype, view.num_slots, config)
    written = chunk.write_values(read, view, weight.flatten(), error, step, config)
    slope = None if config.values_only else chunk.memory_slope(read, written, sequences * span.pairs, config)
    key_write = chunk.write_keys(read, view, slope, sequences * span.length, config, group)
    addressing_loss = key_write.usage.loss_M().mean()
    if call.statistics is not None:
        call.statistics.add_chunk(read.plan, view.memories * view.tables)
    top, plan, route = read.address.top, read.plan, read.route
    tensors: list[Tensor | None] = [keys, top.sub_index, top.sub_score, top.rank, top.score, read.address.weight_YP]
    tensors += [plan.slots_U, plan.inverse_XP, plan.counts_U, plan.segments.order, plan.segments.offsets]
    tensors += [read.rows_UD, step, written.weight_Y, written.unclipped_UD, key_write.unclipped_Gnd]
    tensors += [key_write.usage.mean_M2n]
    queries = plan.segments.pairs
    tensors += [queries if isinstance(queries, Tensor) else None, plan.offsets_X]
    # On one rank, and with columns, the row side has the tensors of the token side; errors then are computed again.
    tensors += [None if route.weight is read.address.weight_YP else route.weight]
    tensors += [None if written.weight_Q is written.weight_Y else written.weight_Q]
    tensors += [None if written.error_QD is written.error_YD else written.error_QD]
    tensors += route.saved()
    call.decays.append(written.decay)
    return read, tensors, loss_BC[:, : span.own_pairs], addressing_loss


def _fill_trace(
    trace: MemoryTrace,
    addresses: list[Address],
    losses: list[Tensor],
    addressing_losses: list[Tensor],
    batch: int,
    config: MemoryConfig,
) -> None:
    shape = (batch, -1, config.heads, config.topk)
    trace.losses = torch.cat(losses, 1)
    trace.addressing_loss = torch.stack(addressing_losses).mean()
    trace.slots_BTHK = torch.cat([(a.slot_YP % config.num_slots).view(shape) for a in addresses], 1)
    trace.weights_BTHK = torch.cat([a.weight_YP.view(shape) for a in addresses], 1)
