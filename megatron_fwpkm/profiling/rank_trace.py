"""What one rank of a layout builds, and what its layers keep for the backward pass, without content or other ranks.

The layers are those that training builds, of fake tensors, which have shapes and no content. Process groups are made of
torch's "fake" backend: this process takes the place of one rank, and collectives return at once. So nothing here says
again what Megatron's layers, attention or a delta net keep: they are run, and asked. Two functions whose sizes depend
on which slots are read, those of the memories, are replaced by ones that save what `memory_rows` says.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fwpkm.memory import FastState, FwPKMLayer, fast_state, fwpkm_layer, pkm_layer, slow_table
from megatron_fwpkm.memory.chunk import ChunkSpan
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.division import TokenDivision
from megatron_fwpkm.memory.functional import chunk_spans
from megatron_fwpkm.memory.pkm_layer import PKMConfig, slow_tables
from megatron_fwpkm.memory.routing import LOCAL, MemoryGroup
from megatron_fwpkm.model.block import Block
from megatron_fwpkm.model.context import make_context
from megatron_fwpkm.model.decoder import DecoderLayers, token_losses
from megatron_fwpkm.model.delta_rule import DeltaRuleInputs
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.profiling.memory_rows import ReadGroup, memory_call, pkm_call

_FLA_CHUNK = 64
"""Tokens of a chunk of flash-linear-attention's gated delta rule: the width of the matrices that it keeps."""


@dataclass(frozen=True)
class RankShape:
    """What determines the layers of a rank and what they keep."""

    model: DecoderConfig
    vocab_size: int
    layout: ParallelConfig
    replicas: int
    """Model copies of the job."""
    batch: int
    """Sequences of a microbatch."""
    dtype: torch.dtype
    """Of weights and activations."""
    separate_documents: bool
    recompute: bool
    gpu_kernels: bool
    """Whether delta nets are flash-linear-attention's, as on a GPU, rather than transformers' in plain torch."""


@dataclass(frozen=True)
class MemoryReads:
    """The calls of one memory layer in one microbatch: rows of this rank, and reads that address them."""

    slots: float
    """Rows of this rank's table that they are spread over."""
    reads: float
    """Expected number of reads that this rank's rows have in one microbatch."""
    row_bytes: int
    chunks: int = 1
    """Chunks that the reads are divided into."""


@dataclass(frozen=True)
class Trace:
    """What one rank has of one stage. Bytes, but for the numbers of weights."""

    parameters: tuple[tuple[str, int], ...]
    """Name and number of elements of each."""
    table_rows: tuple[tuple[int, int], ...]
    """(rows, width) of the values of each PKM layer."""
    table_reads: tuple[MemoryReads, ...]
    fast_bytes: int
    subkey_bytes: int
    """Sub-keys among the fast bytes: what a write replaces and a rollback keeps."""
    memory_reads: tuple[MemoryReads, ...]
    memory_bytes: int
    """Kept by the memories for the backward pass of one microbatch; an expected value for evenly used slots."""
    most_memory_bytes: int
    """The same at most: no two reads of a chunk meet, and those of all ranks address this one's rows."""
    activation_bytes: int
    """Kept by everything else for the backward pass of one microbatch."""


@contextmanager
def silent_ranks(layout: ParallelConfig, replicas: int) -> Iterator[topology.Topology]:
    """Within the context this process is the last tensor-parallel rank of a replica, which has the largest shares.

    The other ranks don't exist; there are as many as the groups of memories and layers need. Raises RuntimeError in a
    process that is a rank already.
    """
    if dist.is_initialized():
        raise RuntimeError("a layout can't be traced in a process that has joined a process group")
    together = replicas if layout.memory.replicas == "synced" else layout.memory.group_replicas
    with ExitStack() as restored:
        restored.enter_context(warnings.catch_warnings())
        restored.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")))
        # Joining a group makes tracebacks name the rank.
        restored.enter_context(mock.patch.object(sys, "excepthook", sys.excepthook))
        warnings.simplefilter("ignore")
        # Its import makes the backend known.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=layout.tensor - 1, world_size=layout.tensor * together)
        try:
            # Stages are built one at a time: what a rank has of a stage is the same however many there are.
            yield topology.build_groups(layout.model_copy(update={"pipeline": 1}))
        finally:
            topology.shut_down()


class RankTracer:
    """Builds and runs parts of a model as the rank of `silent_ranks` would. Use within that context."""

    def __init__(self, shape: RankShape, ranks: topology.Topology) -> None:
        from megatron_fwpkm.parallel.megatron_layers import MegatronBackend

        self._shape, self._ranks = shape, ranks
        self._backend = MegatronBackend(shape.model.initial_std, shape.model.norm_epsilon, ranks.placement)
        self._traced: dict[tuple[int, int, int], Trace] = {}

    def trace(self, first: int, end: int, length: int) -> Trace:
        """Layers first .. end - 1 of the list embedding, blocks, norm, head, on sequences of `length` tokens."""
        key = first, end, length
        if key not in self._traced:
            from torch._subclasses.fake_tensor import FakeTensorMode

            # Who works on which tokens is content, and real.
            with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as replaced:
                kept = _Kept(self._shape)
                for owner, name, value in kept.replacements():
                    replaced.enter_context(mock.patch.object(owner, name, value))
                self._traced[key] = self._run(_Stage(self._shape, self._backend, first, end), length, kept)
        return self._traced[key]

    def _run(self, stage: _Stage, length: int, kept: _Kept) -> Trace:
        stage.convert(self._shape.dtype)
        kept.weights = stage.weights()
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            stage.run(length)
        states = [block.memory.fast_state for block in stage.blocks if block.memory is not None]
        return Trace(
            parameters=tuple((name, weight.numel()) for name, weight in stage.named_parameters()),
            table_rows=tuple(tuple(table.values_ND.shape) for table in slow_tables(stage).values()),  # type: ignore[misc]
            table_reads=tuple(kept.table_reads),
            fast_bytes=sum(state.num_bytes for state in states),
            subkey_bytes=sum(state.keys_H2nd.nbytes for state in states),
            memory_reads=tuple(kept.memory_reads),
            memory_bytes=round(kept.expected + kept.inside.bytes),
            most_memory_bytes=round(kept.most + kept.inside.bytes),
            activation_bytes=kept.outside.bytes,
        )


class _Stage(nn.Module):
    """Consecutive layers of a decoder."""

    def __init__(self, shape: RankShape, backend: Any, first: int, end: int) -> None:
        super().__init__()
        self._shape, self._backend = shape, backend
        layers, model = DecoderLayers(shape.model, shape.vocab_size, backend, seed=1), shape.model
        self._is_first, self._is_last = first == 0, end == model.layers + 3
        self.embedding = layers.embedding() if self._is_first or (self._is_last and model.tied_embeddings) else None
        self._blocks = nn.ModuleList(layers.block(index) for index in range(model.layers) if first <= 1 + index < end)
        for block in self.blocks:
            block.recompute = shape.recompute
        self.norm = layers.norm() if self._is_last else None
        self.head = layers.head() if self._is_last else None

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self._blocks]

    def convert(self, dtype: torch.dtype) -> None:
        """As `.to(dtype)`, which fake tensors refuse."""
        for module in self.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(weight.detach().to(dtype))
        for table in slow_tables(self).values():
            table.values_ND = table.values_ND.detach().to(dtype).requires_grad_()

    def weights(self) -> set[int]:
        """Storages of what training changes."""
        tensors = [*self.parameters(), *(table.values_ND for table in slow_tables(self).values())]
        return {_storage(tensor) for tensor in tensors}

    def run(self, length: int) -> None:
        """Forward pass of a microbatch: from tokens or a message, to a message or the losses."""
        shape, shares = self._shape, self._token_shares
        tokens_BT = torch.zeros(shape.batch, length, dtype=torch.int64)
        documents_BT = torch.zeros_like(tokens_BT) if shape.separate_documents else None
        context = make_context(
            shape.model, tokens_BT, shape.dtype, documents_BT=documents_BT, positions_BT=documents_BT
        )
        if self._is_first:
            assert self.embedding is not None
            h_BTE = self.embedding(tokens_BT)
        else:
            sizes = (shape.batch, length // shares, shape.model.hidden_size)
            h_BTE = torch.zeros(sizes, dtype=shape.dtype, requires_grad=True)
        for block in self.blocks:
            h_BTE = block(h_BTE, context)
        if not self._is_last:
            return
        assert self.norm is not None and self.head is not None
        h_BTE = self.norm(h_BTE)
        if shape.model.tied_embeddings:
            assert self.embedding is not None
            logits_BTV = self.head(h_BTE, self.embedding.weight)
        else:
            logits_BTV = self.head(h_BTE)
        token_losses(self._backend, logits_BTV, tokens_BT)

    @property
    def _token_shares(self) -> int:
        placement = self._backend.placement
        return placement.tensor_ranks if placement.sequence_parallel else 1


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Storages:
    """Distinct storages, kept alive so that none takes another's place."""

    def __init__(self) -> None:
        self._found: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> None:
        self._found[_storage(tensor)] = tensor.untyped_storage()

    def __contains__(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._found

    @cached_property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._found.values())


class _Kept:
    """What a forward pass keeps, within memories and outside, and what takes the place of the memories."""

    def __init__(self, shape: RankShape) -> None:
        self._shape = shape
        self.weights: set[int] = set()
        self.inside, self.outside = _Storages(), _Storages()
        self.expected = self.most = 0.0
        self.memory_reads: list[MemoryReads] = []
        self.table_reads: list[MemoryReads] = []
        self._within_memory = False

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves."""
        if _storage(tensor) not in self.weights and tensor not in self.inside and tensor not in self.outside:
            (self.inside if self._within_memory else self.outside).add(tensor)
        return tensor

    def replacements(self) -> Iterator[tuple[Any, str, Any]]:
        """(owner, name, value) of what is replaced."""
        # skip_init() makes a module without content and then gives it storage, which fake tensors refuse.
        yield nn.utils, "skip_init", lambda kind, *sizes, **options: kind(*sizes, **options)
        for module in (fast_state, slow_table):
            yield module, "draw_part", _draw_nothing
        yield FwPKMLayer, "_divide", _whole_sequences
        yield FastState, "view", lambda state, *arguments, **options: state
        yield fwpkm_layer, "fast_memory", self._fast_memory
        yield pkm_layer._ProductKeyValues, "apply", self._product_key_values
        if self._shape.gpu_kernels:
            from megatron_fwpkm.parallel import megatron_layers

            yield megatron_layers, "choose_delta_rule", lambda: _fla_rule

    def _fast_memory(
        self,
        query: Tensor,
        target: Tensor,
        gate: Tensor | None,
        mask: Tensor | None,
        view: FastState,
        config: MemoryConfig,
        *,
        group: MemoryGroup = LOCAL,
        spans: list[ChunkSpan] | None = None,
        **_: Any,
    ) -> Tensor:
        """In place of `fast_memory`: saves its inputs and output, and counts the rest."""
        spans = chunk_spans(query.shape[1], config) if spans is None else spans
        call = memory_call(config, query.shape[0], spans, ReadGroup.of(group))
        self.expected += call.expected_bytes
        self.most += call.most_bytes
        self.memory_reads.append(MemoryReads(call.slots, call.reads, call.row_bytes, len(spans)))
        dtype, tokens = view.dtype, sum(span.own_length for span in spans)
        inputs = (query.to(dtype), target.to(dtype), None if gate is None else gate.to(dtype), mask)
        return self._inside(_Memory.apply, *inputs, tokens).to(target.dtype)

    def _product_key_values(
        self, query: Tensor, keys: Tensor, values: Tensor, config: PKMConfig, group: MemoryGroup, tokens: int
    ) -> Tensor:
        """In place of `_ProductKeyValues.apply`."""
        call = pkm_call(config, query.shape[0], tokens, ReadGroup.of(group), query.dtype.itemsize)
        self.expected += call.expected_bytes
        self.most += call.most_bytes
        self.table_reads.append(MemoryReads(call.slots, call.reads, call.row_bytes))
        return cast(Tensor, self._inside(_Values.apply, query, keys, values, config))

    def _inside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._within_memory = True
        try:
            return function(*arguments)
        finally:
            self._within_memory = False


def _draw_nothing(*_: Any) -> None:
    """In place of drawing a rank's part of a table line by line."""


def _whole_sequences(layer: FwPKMLayer, hidden_BTE: Tensor, documents_BT: Tensor | None) -> TokenDivision:
    """In place of dividing a batch by its documents: as if each sequence were one."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    batch, tokens = layer._batch_shape(hidden_BTE)
    with unset_fake_temporarily():
        call_BT = torch.arange(batch * tokens).view(batch, tokens)
        return layer._make_division([call_BT], (batch, tokens), torch.device("cpu"))


class _Memory(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, target: Tensor, gate: Tensor | None, mask: Tensor | None, tokens: int
    ) -> Tensor:
        output = target.new_empty(query.shape[0], tokens, target.shape[2])
        ctx.save_for_backward(query, target, gate, mask, output)
        return output


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, config: PKMConfig) -> Tensor:
        halves = query.flatten().clone()
        weight = query.new_empty(config.heads, query.shape[0], config.topk)
        ctx.save_for_backward(halves, keys, values, weight)
        return query.new_empty(query.shape[0], config.v_dim)


class _FlaDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        # flash-linear-attention (ops/gated_delta_rule/chunk.py) keeps its inputs, the sums of the decays in float32 and
        # a triangular matrix for each chunk.
        sums = torch.empty_like(decay, dtype=torch.float32)
        matrices = k.new_empty(*k.shape[:3], _FLA_CHUNK)
        ctx.save_for_backward(q, k, v, sums, beta, matrices)
        return torch.empty_like(v)


def _fla_rule(
    inputs: DeltaRuleInputs, state_BHKV: Tensor | None = None, starts_BT: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    parts: Sequence[Tensor] = (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.decay_BTH, inputs.beta_BTH)
    return cast(Tensor, _FlaDeltaRule.apply(*parts)), None
