"""Inference: a memory that takes tokens in calls of any size.

`aligned` (the default): chunk boundaries stand at absolute positions and a chunk is written when it is complete, so
outputs do not depend on how the stream is cut into calls and equal one training call over the same tokens. The ragged
tail is written by `finish()`.

`official`: the paper's code (semantics C), whose outputs depend on the cut; for parity with it.

The memories of a cache lie over the fast state as an overlay: the state itself never changes, unless a cache with one
shared memory is committed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fwpkm_kernels import ProductKeyTopk
from megatron_fwpkm.memory import addressing, chunk
from megatron_fwpkm.memory.addressing import Address, Usage
from megatron_fwpkm.memory.chunk import ChunkRead
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import FastState
from megatron_fwpkm.memory.inputs import check_inputs
from megatron_fwpkm.memory.overlay import Overlay
from megatron_fwpkm.memory.routing import LOCAL, LocalRoute
from megatron_fwpkm.memory.whole_state import WholeState


@dataclass
class CacheTrace:
    """What calls leave beside their outputs, on request: slots and weights [B, T, H, K] of the last call, and of each
    write since the trace was attached its losses [B, pairs] and addressing losses [memories]."""

    slots_BTHK: Tensor | None = None
    weights_BTHK: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    addressing_losses: list[Tensor] = field(default_factory=list)


@dataclass
class _Tokens:
    """Tokens of a chunk that wait for their write, [B, c, ...]."""

    query: Tensor
    target: Tensor
    gate: Tensor | None
    mask: Tensor | None

    def __len__(self) -> int:
        return self.query.shape[1]

    def __getitem__(self, piece: slice) -> _Tokens:
        parts = (self.query, self.target, self.gate, self.mask)
        return _Tokens(*(None if t is None else t[:, piece] for t in parts))  # type: ignore[arg-type]

    def clone(self) -> _Tokens:
        """A copy that does not hold on to the caller's tensors."""
        parts = (self.query, self.target, self.gate, self.mask)
        return _Tokens(*(None if t is None else t.clone() for t in parts))  # type: ignore[arg-type]


def _join(pieces: list[_Tokens]) -> _Tokens:
    """Tokens one after the other. A missing mask stands for all true, a missing gate for ones."""
    if len(pieces) == 1:
        return pieces[0]
    gate = mask = None
    if any(t.gate is not None for t in pieces):
        gate = torch.cat([t.query.new_ones(t.query.shape[:2]) if t.gate is None else t.gate for t in pieces], 1)
    if any(t.mask is not None for t in pieces):
        mask = torch.cat([_all_true(t) if t.mask is None else t.mask for t in pieces], 1)
    return _Tokens(torch.cat([t.query for t in pieces], 1), torch.cat([t.target for t in pieces], 1), gate, mask)


def _all_true(tokens: _Tokens) -> Tensor:
    return torch.ones(tokens.query.shape[:2], dtype=torch.bool, device=tokens.query.device)


class MemoryCache:
    """The memories of one layer for one batch of streams.

    Args:
        state: the fast state that all memories start from
        batch: number of sequences
        mode: "aligned" or "official"; None takes the configuration's `cache_mode`
        memory: "per_sequence" or "shared"; None takes the configuration's `cache_memory`
    """

    def __init__(
        self,
        state: FastState | WholeState,
        batch: int,
        *,
        mode: Literal["aligned", "official"] | None = None,
        memory: Literal["per_sequence", "shared"] | None = None,
    ) -> None:
        self.config: MemoryConfig = state.config
        self.mode = mode or self.config.cache_mode
        memory = memory or self.config.cache_memory
        if self.mode not in ("aligned", "official"):
            raise ValueError(f"cache mode is {mode!r}; allowed: 'aligned', 'official'")
        if memory not in ("per_sequence", "shared"):
            raise ValueError(f"cache memory is {memory!r}; allowed: 'per_sequence', 'shared'")
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"a cache is for 1 sequence or more, not {batch!r}")
        self.batch = batch
        self.view = Overlay(state, batch if memory == "per_sequence" else 1)
        self.num_tokens = 0
        self.trace: CacheTrace | None = None
        self._waiting: list[_Tokens] = []
        self._num_waiting = 0
        self._reads: list[ChunkRead] = []  # aligned: the reads of the waiting tokens
        self.frozen = False

    def __call__(
        self, query_BTHk: Tensor, target_BTD: Tensor, gate_BT: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """Read for new tokens and write whatever chunks they complete; returns the reads [B, T, D]. No gradients.

        Shapes as in `fast_memory`. While `frozen` is set the tokens are only read for, and not remembered.

        Raises:
            ValueError: wrong shapes or dtypes, or another batch size than the cache was made for.
            RuntimeError: the state under the cache was written meanwhile, or an earlier call failed half-way.
        """
        if query_BTHk.shape[0] != self.batch:
            raise ValueError(f"the cache was made for {self.batch} sequences; this call has {query_BTHk.shape[0]}")
        self.view.check_usable()
        check_inputs(query_BTHk, target_BTD, gate_BT, mask_BT, self.view, self.config)
        dtype = self.view.keys_MH2nd.dtype
        gate = None if gate_BT is None else gate_BT.to(dtype)
        tokens = _Tokens(query_BTHk.to(dtype), target_BTD.to(dtype), gate, mask_BT)
        if len(tokens) == 0:
            return target_BTD.clone()
        with torch.no_grad(), self.view.call(), torch.autocast(query_BTHk.device.type, enabled=False):
            reads = self._aligned(tokens) if self.mode == "aligned" else self._official(tokens)
        if self.trace is not None:
            shape = (self.batch, -1, self.config.heads, self.config.topk)
            slots = [(r.address.slot_YP % self.config.num_slots).view(shape) for r in reads]
            self.trace.slots_BTHK = torch.cat(slots, 1)
            self.trace.weights_BTHK = torch.cat([r.address.weight_YP.view(shape) for r in reads], 1)
        self.num_tokens += len(tokens)
        return torch.cat([r.read_YD.view(self.batch, -1, self.config.v_dim) for r in reads], 1).to(target_BTD.dtype)

    def finish(self) -> None:
        """Write the tokens that wait for their chunk to fill (aligned mode), as a training call's ragged tail.

        The next token starts a new chunk, as the first of another training call would.
        """
        if self.mode == "aligned" and self._waiting:
            with torch.no_grad(), self.view.call():
                self._write_aligned()

    def commit(self) -> None:
        """Make a shared memory the fast state's own. Raises ValueError for a memory per sequence."""
        self.view.commit()

    def _read(self, query: Tensor) -> ChunkRead:
        memories = self.view.memories
        halves = addressing.split_queries(query.reshape(memories, -1, *query.shape[2:]))
        return chunk.read_chunk(halves, self.view, self.config)

    def _wait(self, tokens: _Tokens) -> None:
        self._waiting.append(tokens)
        self._num_waiting += len(tokens)

    # -- aligned ----------------------------------------------------------------------------------------------------

    def _aligned(self, tokens: _Tokens) -> list[ChunkRead]:
        size = None if self.config.chunk_size == "sequence" else int(self.config.chunk_size)
        reads, start = [], 0
        while start < len(tokens):
            end = len(tokens) if size is None else min(start + size - self._num_waiting, len(tokens))
            completes = size is not None and self._num_waiting + end - start == size
            # Tokens that outlive the call are copied: the caller may use its buffers again.
            piece = tokens[start:end] if completes or self.frozen else tokens[start:end].clone()
            read = self._read(piece.query)
            reads.append(read)
            start = end
            if self.frozen:
                continue
            self._wait(piece)
            self._reads.append(read)
            if completes:
                self._write_aligned()
        return reads

    def _write_aligned(self) -> None:
        tokens, read = _join(self._waiting), self._join_reads()
        batch, length, memories = self.batch, len(tokens), self.view.memories
        read_BCD = read.read_YD.view(batch, length, -1)
        span = chunk.chunk_span(0, length, self.config.lookahead)
        error = chunk.lookahead_errors(read_BCD, tokens.target[:, span.targets]).flatten(0, 1)
        weight_BC = chunk.write_weights(tokens.gate, tokens.mask, read_BCD, span.pairs, self.config)
        scale = chunk.write_scale(tokens.mask, batch, span, memories, self.config)
        step = chunk.row_steps(read.plan, scale, error.dtype, self.config.num_slots, self.config)
        self._write(read, weight_BC, error, step, span.pairs)
        self._waiting, self._num_waiting, self._reads = [], 0, []

    def _write(self, read: ChunkRead, weight_BC: Tensor, error_YD: Tensor, step_U: Tensor, pairs: int) -> None:
        weight_Y = weight_BC.flatten()
        per_memory = self.batch // self.view.memories
        tokens = read.address.query_GXd.shape[1]
        if self.trace is not None:
            loss = (weight_Y * error_YD.square().mean(1)).view(self.batch, -1)
            self.trace.losses.append(loss[:, :pairs])
            usage = Usage(read.address.top, self.view.memories, tokens, self.config)
            self.trace.addressing_losses.append(usage.loss_M())
        written = chunk.write_values(read, self.view, weight_Y, error_YD, step_U, self.config)
        slope = None if self.config.values_only else chunk.memory_slope(read, written, per_memory * pairs, self.config)
        chunk.write_keys(read, self.view, slope, tokens, self.config)

    def _join_reads(self) -> ChunkRead:
        """The waiting reads as one chunk. They all saw the memory as it still is."""
        if len(self._reads) == 1:
            return self._reads[0]
        per_memory = self.batch // self.view.memories

        def join(tensors: list[Tensor], axis: int) -> Tensor:
            """Concatenate along tokens where `axis` is (sequences of one memory, tokens) flattened."""
            parts = [t.unflatten(axis, (per_memory, -1)) for t in tensors]
            return torch.cat(parts, axis + 1).flatten(axis, axis + 1)

        def join_all(tensors: list[Tensor]) -> Tensor:
            parts = [t.unflatten(0, (self.batch, -1)) for t in tensors]
            return torch.cat(parts, 1).flatten(0, 1)

        addresses = [read.address for read in self._reads]
        top = ProductKeyTopk(
            join([a.top.sub_index for a in addresses], 1),
            join([a.top.sub_score for a in addresses], 1),
            join([a.top.rank for a in addresses], 2),
            join([a.top.slot for a in addresses], 1),
            join([a.top.score for a in addresses], 1),
        )
        address = Address(
            join([a.query_GXd for a in addresses], 1),
            top,
            join_all([a.slot_YP for a in addresses]),
            join_all([a.weight_YP for a in addresses]),
        )
        route = LOCAL.route(address.slot_YP, address.weight_YP)
        rows_UD = self.view.read_rows(route.plan.slots_U)
        return ChunkRead(address, route, rows_UD, join_all([r.read_YD for r in self._reads]))

    # -- official -----------------------------------------------------------------------------------------------------

    def _official(self, tokens: _Tokens) -> list[ChunkRead]:
        """semantics C: a queue that is written whenever it holds a chunk, and keeps its last `lookahead` tokens."""
        size = None if self.config.chunk_size == "sequence" else int(self.config.chunk_size)
        reads, start = [], 0
        while start < len(tokens):
            if size is None:  # the chunk is the whole input of a call
                length = len(tokens)
            else:
                length = size + self.config.lookahead - self._num_waiting if start == 0 else size
            piece = tokens[start : start + length]
            read = self._read(piece.query)
            reads.append(read)
            start += len(piece)
            if self.frozen:
                continue
            self._wait(piece.clone())
            if size is None or self._num_waiting >= size:
                self._write_official(read, len(piece))
        return reads

    def _write_official(self, current: ChunkRead, slice_length: int) -> None:
        config, queue, lookahead = self.config, _join(self._waiting), self.config.lookahead
        pairs = len(queue) - lookahead
        if pairs <= 0:
            return
        head = queue[:pairs]
        read = self._read(head.query)
        error = read.read_YD - queue[lookahead:].target.flatten(0, 1)
        weight_BC = read.read_YD.new_ones(self.batch, pairs)
        if head.gate is not None and config.weigh_write_by_gate:
            weight_BC = weight_BC * head.gate
        if head.mask is not None:
            weight_BC = weight_BC * head.mask
        per_memory = self.batch // self.view.memories
        samples: float | Tensor = float(per_memory * slice_length)
        if head.mask is not None:
            samples = head.mask.unflatten(0, (self.view.memories, -1)).sum((1, 2)).double()
        scale = samples * (config.reads_per_token / (per_memory * pairs))
        # Reads are counted in the current slice only; rows that it did not read are not divided.
        position = torch.searchsorted(current.plan.slots_U, read.plan.slots_U)
        position = position.clamp_max(current.plan.slots_U.numel() - 1)
        found = current.plan.slots_U[position] == read.plan.slots_U
        counts = current.plan.counts_U[position].where(found, 1)
        read.route = LocalRoute(dataclasses.replace(read.plan, counts_U=counts), read.route.weight)
        step = chunk.row_steps(read.plan, scale, error.dtype, config.num_slots, config)
        self._write(read, weight_BC, error, step, pairs)
        self._waiting, self._num_waiting = ([queue[pairs:].clone()], lookahead) if lookahead else ([], 0)
