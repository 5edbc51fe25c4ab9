"""The FwPKM sublayer: projections, z-scored value, gate, memory, output (semantics D).

    q = W_q norm(h)          r = zscore(W_v norm'(h))          g = sigmoid(mean(W_g norm''(h)))
    v = memory(q, r, g)      o = g v + (1 - g) r               layer output = W_o norm'''(o)

Letters: B batch, T tokens, E hidden size, H heads, k = k_dim, D = v_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fwpkm.accounting import ParameterCount
from megatron_fwpkm.memory.backward import MemoryTrace
from megatron_fwpkm.memory.cache import MemoryCache
from megatron_fwpkm.memory.chunk import ChunkSpan
from megatron_fwpkm.memory.config import MemoryConfig, Reset
from megatron_fwpkm.memory.division import TokenDivision
from megatron_fwpkm.memory.documents import groups_of_documents
from megatron_fwpkm.memory.exchange import RankGroup
from megatron_fwpkm.memory.fast_state import FastState
from megatron_fwpkm.memory.functional import fast_memory
from megatron_fwpkm.memory.groups import make_memory_group
from megatron_fwpkm.memory.inputs import check_loss_mask
from megatron_fwpkm.memory.norms import RMSNorm
from megatron_fwpkm.memory.placement import ALONE, Placement
from megatron_fwpkm.memory.routing import MemoryGroup, count_owned_slots
from megatron_fwpkm.memory.statistics import MemoryStatistics
from megatron_fwpkm.memory.tokens import added_over
from megatron_fwpkm.memory.traffic import Traffic
from megatron_fwpkm.memory.whole_state import WholeState

ZSCORE_EPSILON = 1e-6


def zscore(x: Tensor, size: int | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """(x - mean) / (std + 1e-6) over the last axis, with the unbiased standard deviation; float32 or wider inside.

    Where columns are spread over a group `size` is the number of all. Differentiable everywhere: for a constant row the
    gradient of the standard deviation is taken as 0.
    """
    size = size or x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - added_over(wide.sum(-1, keepdim=True), group) / size
    variance = added_over(centred.square().sum(-1, keepdim=True), group) / max(size - 1, 1)
    positive = variance > 0
    deviation = variance.where(positive, 1).sqrt().where(positive, 0)
    return (centred / (deviation + ZSCORE_EPSILON)).to(x.dtype)


class FwPKMLayer(nn.Module):
    """An extra sublayer with a fast-weight memory: returns what to add to the residual stream.

    Args:
        hidden_size: width E of the residual stream
        config: the memory's settings
        seed: of the fast state's initial values (the same on all replicas)
        linear: makes a projection (in_features, out_features, bias) that returns a tensor
        norm: makes a norm of a given width
        dtype: of the fast state; float64 in tests only
        placement: the ranks that the slots and the tokens are spread over

    With several ranks `linear` and `norm` make layers whose weights are the same on all of them and whose gradients are
    summed over the tensor-parallel ranks, since each sees its own tokens only.

    The fast state is a plain attribute: no parameter, no buffer. `.to(device)` moves it, `.to(dtype)` does not change
    it. With `memory_reads` off a read is 0, so the layer passes its own value only, (1 - g) r. `reset` is the reset
    policy, at first the configuration's; measurements may set another. A `trace` set by the caller is filled by calls
    without a cache (on whole sequences and one rank).
    """

    def __init__(
        self,
        hidden_size: int,
        config: MemoryConfig,
        *,
        seed: int = 0,
        linear: Callable[..., nn.Module] = nn.Linear,
        norm: Callable[[int], nn.Module] = RMSNorm,
        dtype: torch.dtype = torch.float32,
        placement: Placement = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.hidden_size, self.placement = config, hidden_size, placement
        self.sequence_parallel = placement.sequence_parallel
        self.query_norm = norm(hidden_size)
        self.query_projection = linear(hidden_size, config.heads * config.k_dim, bias=True)
        self._build_value(linear, norm)
        self.gate_norm = norm(hidden_size)
        self.gate_projection = linear(hidden_size, config.gate_outputs, bias=True)
        self._build_output(linear, norm)
        self.memory_reads = True
        self.reset: Reset = config.reset
        self.trace: MemoryTrace | None = None
        self.fast_state = FastState(
            config,
            seed=seed,
            dtype=dtype,
            rank=placement.memory_rank,
            ranks=placement.memory_ranks,
            sharding=placement.sharding,
        )
        # Where sequences have memories of their own, replicas' batches don't write together.
        self._groups: dict[bool, MemoryGroup] = {
            apart: make_memory_group(placement, config, apart=apart) for apart in (False, True)
        }
        self._division: tuple[tuple[torch.Size, torch.device, bool], TokenDivision] | None = None
        # With columns every rank has the use of all slots.
        spread = placement.memory_group if placement.sharding == "slots" else None
        self._statistics = MemoryStatistics(config, self.fast_state.num_slots, spread)

    def _build_value(self, linear: Callable[..., nn.Module], norm: Callable[[int], nn.Module]) -> None:
        self.value_norm = norm(self.hidden_size)
        self.value_projection = linear(self.hidden_size, self.config.v_dim, bias=True)

    def _build_output(self, linear: Callable[..., nn.Module], norm: Callable[[int], nn.Module]) -> None:
        self.output_norm = norm(self.config.v_dim)
        self.output_projection = linear(self.config.v_dim, self.hidden_size, bias=True)

    def forward(
        self,
        hidden_BTE: Tensor,
        loss_mask_BT: Tensor | None = None,
        cache: MemoryCache | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """[B, T, E] residual stream to [B, T, E] of what to add to it.

        The loss mask is bool [B, T], true where a token may be written. With a cache the tokens continue its streams;
        without one, training calls write the fast state by its reset policy and others leave it as it was. The
        policy `per_document` needs `documents_BT`, numbers that tell the documents of a sequence apart; others
        take no notice of it.

        Over several ranks all call this together, with batches of one size, and all or none with a mask. Under
        sequence parallelism hidden states are [B, T / R, E], this rank's stretch of every sequence; mask and documents
        are of all T tokens, everywhere.

        Raises:
            ValueError: wrong shapes or dtypes (see `fast_memory`), no documents where the policy needs them,
                documents where several replicas write one memory, or a cache under sequence parallelism.
        """
        divided = self.placement.tensor_ranks > 1
        if cache is not None and divided and self.sequence_parallel:
            raise ValueError("a cache is for ranks that all have all tokens: set sequence_parallel = False for a while")
        if cache is not None or not (self.memory_reads or divided):
            query, value, gate = self._project(hidden_BTE)
            read = torch.zeros_like(value)
            if cache is not None and self.memory_reads:
                read = self._recall(cache, query, value, gate, loss_mask_BT)
            return self._output(read, value, gate, hidden_BTE.dtype)
        self.fast_state.begin_microbatch()
        if divided or self.reset == "per_document":
            return self._forward_divided(hidden_BTE, loss_mask_BT, documents_BT)
        query, value, gate = self._project(hidden_BTE)
        read = self._call_memory(query, value, gate, loss_mask_BT)
        return self._output(read, value, gate, hidden_BTE.dtype)

    def _recall(self, cache: MemoryCache, query: Tensor, value: Tensor, gate: Tensor, mask: Tensor | None) -> Tensor:
        """The reads of a cache's next tokens, which all ranks have."""
        return cache(query, value, gate, mask)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [..., H, k], value [..., D], gate [...] of hidden states [..., E]."""
        return self._query(hidden), self._value(hidden), self._gate(hidden)

    def _query(self, hidden: Tensor) -> Tensor:
        return self.query_projection(self.query_norm(hidden)).unflatten(-1, (self.config.heads, -1))

    def _value(self, hidden: Tensor) -> Tensor:
        value = self.value_projection(self.value_norm(hidden))
        return zscore(value) if self.config.normalize_value else value

    def _gate(self, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_projection(self.gate_norm(hidden)).mean(-1))

    def _output(self, read: Tensor, value: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """Reads and values [..., D], gates [...], to [..., E]."""
        if self.config.fuse_output_by_gate:
            share = gate.unsqueeze(-1).to(value.dtype)
            read = share * read + (1 - share) * value
        return self.output_projection(self.output_norm(read.to(dtype)))

    def _forward_divided(self, hidden_BTE: Tensor, mask_BT: Tensor | None, documents_BT: Tensor | None) -> Tensor:
        """Each rank on its own tokens of every chunk of every call; rows of tokens, X outside and Y inside."""
        if self.trace is not None:
            raise ValueError("a trace is of one call on one rank: set trace = None for divided tokens or documents")
        check_loss_mask(mask_BT, self._batch_shape(hidden_BTE))
        division = self._divide(hidden_BTE, documents_BT)
        rows_XE = division.enter(hidden_BTE.flatten(0, 1))
        query, value, gate = self._project(rows_XE)
        # Query and gate in one message.
        width = self.config.heads * self.config.k_dim
        packed = division.to_own(torch.cat([query.flatten(1), gate.unsqueeze(1)], 1))
        own = (packed[:, :width].unflatten(1, query.shape[1:]), division.to_targets(value), packed[:, width])
        mask_Y = None if mask_BT is None else mask_BT.flatten()[division.own]
        read_XD = (
            division.back(self._remember_calls(*own, mask_Y, division))
            if self.memory_reads
            else torch.zeros_like(value)
        )
        output_XE = self._output(read_XD, value, gate, hidden_BTE.dtype)
        return division.leave(output_XE).view_as(hidden_BTE)

    def _divide(self, hidden_BTE: Tensor, documents_BT: Tensor | None) -> TokenDivision:
        """Who works on which tokens: the same as in the last call, as a rule."""
        if self.reset == "per_document":
            return self._divide_documents(hidden_BTE, documents_BT)
        key = (hidden_BTE.shape, hidden_BTE.device, self.sequence_parallel)
        if self._division is None or self._division[0] != key:
            batch, tokens = self._batch_shape(hidden_BTE)
            with torch.inference_mode(False):  # kept: autograd must be able to use it later
                call_BT = torch.arange(batch * tokens).view(batch, tokens)
                self._division = key, self._make_division([call_BT], (batch, tokens), hidden_BTE.device)
        return self._division[1]

    def _make_division(self, calls: list[Tensor], shape: tuple[int, int], device: torch.device) -> TokenDivision:
        return TokenDivision(calls, shape, self.config, self._placement_now(), device)

    def _placement_now(self) -> Placement:
        """The placement, with all tokens on each rank where the model is used so for a while."""
        return dataclasses.replace(self.placement, sequence_parallel=self.sequence_parallel)

    def _batch_shape(self, hidden_BTE: Tensor) -> tuple[int, int]:
        stretches = self.placement.tensor_ranks if self.sequence_parallel else 1
        return hidden_BTE.shape[0], hidden_BTE.shape[1] * stretches

    def _divide_documents(self, hidden_BTE: Tensor, documents_BT: Tensor | None) -> TokenDivision:
        if documents_BT is None:
            raise ValueError(
                "a memory that is reset per_document needs to know the documents: give documents_BT, or set reset "
                "to carry, per_step or per_sequence"
            )
        if self.placement.replicas > 1:
            raise ValueError(
                f"a memory that {self.placement.replicas} replicas write together can't be reset per_document: their "
                "documents differ; set reset to carry, per_step or per_sequence, or the memory group to one replica"
            )
        shape = self._batch_shape(hidden_BTE)
        if tuple(documents_BT.shape) != shape:
            raise ValueError(
                f"documents have shape {tuple(documents_BT.shape)}; expected {shape} to go with the tokens"
            )
        groups = [tokens_NL.cpu() for tokens_NL in groups_of_documents(documents_BT)]
        return self._make_division(groups, shape, hidden_BTE.device)

    def _remember_calls(
        self, query_YHk: Tensor, target_XD: Tensor, gate_Y: Tensor, mask_Y: Tensor | None, division: TokenDivision
    ) -> Tensor:
        """The reads [Y, D] of this rank's own tokens, call after call."""
        tokens = [call.batch * call.tokens for call in division.calls]
        targets = [call.batch * call.targets for call in division.calls]
        masks = [None] * len(tokens) if mask_Y is None else mask_Y.split(tokens)
        parts = zip(
            division.calls, query_YHk.split(tokens), target_XD.split(targets), gate_Y.split(tokens), masks, strict=True
        )
        reads = [target_XD[:0]]
        with self._counted_together():
            for call, query, target, gate, mask in parts:
                read = self._call_memory(
                    query.unflatten(0, (call.batch, call.tokens)),
                    target.unflatten(0, (call.batch, call.targets)),
                    gate.unflatten(0, (call.batch, call.tokens)),
                    None if mask is None else mask.unflatten(0, (call.batch, call.tokens)),
                    call.spans,
                )
                reads.append(read.flatten(0, 1))
        return torch.cat(reads)

    def _counted_together(self) -> AbstractContextManager[None]:
        """Calls on documents are on memories of their own and count as one."""
        return self._statistics.together() if self.reset == "per_document" else nullcontext()

    def _call_memory(
        self, query: Tensor, target: Tensor, gate: Tensor, mask: Tensor | None, spans: list[ChunkSpan] | None = None
    ) -> Tensor:
        """One call, on all tokens of its sequences or on this rank's."""
        view = self.fast_state.view(
            query.shape[0], training=self.training, reset=self.reset, replicas=self.placement.replicas
        )
        return fast_memory(
            query,
            target,
            gate,
            mask,
            view,
            self.config,
            statistics=self._statistics,
            trace=self.trace,
            group=self._groups[self.reset in ("per_sequence", "per_document")],
            spans=spans,
        )

    def make_cache(self, batch: int, **options: Any) -> MemoryCache:
        """Streams for inference that start from the fast state as it is now; options as `MemoryCache` has them.

        Over several ranks all have all tokens and call the cache together; rows come from their owners, and the ranks
        keep the same copies of what is written. Raises ValueError where several replicas have one memory.
        """
        if self.placement.memory_group is None:
            return MemoryCache(self.fast_state, batch, **options)
        if self.placement.replicas > 1:
            raise ValueError(
                f"a cache is for one replica's streams and this memory is that of {self.placement.replicas}; give "
                "each replica a memory of its own for inference"
            )
        return MemoryCache(WholeState(self.fast_state, self.placement.memory_group), batch, **options)

    def statistics(self) -> dict[str, Tensor]:
        """Statistics of the last call (see `MemoryStatistics`); reading them does not synchronize."""
        return self._statistics.tensors()

    def traffic(self) -> Traffic | None:
        """What this rank sent for the memory since the last call; None where it is on one rank."""
        shared, apart = (self._groups[kind] for kind in (False, True))
        if isinstance(shared, RankGroup) and isinstance(apart, RankGroup):
            return shared.traffic.take() + apart.traffic.take()
        return None

    def num_parameters(self) -> ParameterCount:
        """Slow: projections and norms; fast: sub-keys and values, of which a token takes all sub-keys and its rows."""
        slow, state, placement = sum(p.numel() for p in self.parameters()), self.fast_state, self.placement
        keys, slots = state.keys_H2nd.numel(), self.config.num_slots
        if state.owned is not None:
            slots = count_owned_slots(self.config.n_subkeys, placement.memory_rank, placement.memory_ranks)
        read = self.config.reads_per_token * self.config.v_dim // placement.memory_ranks
        return ParameterCount(slow, keys + slots * state.v_dim, slow + keys + read)

    def num_flops_per_token(self, sequence_length: int = 0) -> int:
        """Operations of forward and backward per token (a multiply-add is two), at any sequence length."""
        config = self.config
        heads_k, reads = config.heads * config.k_dim, config.reads_per_token
        projections = self.hidden_size * (heads_k + 2 * config.v_dim + config.gate_outputs)
        scoring = 2 * config.n_subkeys * heads_k  # forward only: the backward pass is sparse
        # Passes over (token, slot) pairs: read, write | rho, slot weights twice, row gradients.
        slots = 2 * reads * config.v_dim * (2 + 4)
        # Passes over (token, sub-key) pairs: write | along, query twice, keys.
        subkeys = 2 * config.topk * heads_k * (1 + 4)
        return 6 * projections + scoring + slots + subkeys

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FwPKMLayer:
        """Devices follow the module, dtypes do not."""
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, device=self.fast_state.device))
        if probe.device.type != "meta":
            self.fast_state.to(probe.device)
        return self
