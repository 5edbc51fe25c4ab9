"""The decoder as a pipeline: a list of layer specs, of which each stage builds and runs its own.

Between stages go hidden states and, where documents are kept apart, the numbers of the documents and the positions;
what follows from these (rotary tables, places in documents) every stage computes itself.

Shape legend: B batch, T sequence, E hidden size (T / R tokens of it under sequence parallelism), V vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, ProcessTopology
from deepspeed.runtime.utils import partition_balanced
from torch import nn

from megatron_fwpkm.accounting import ParameterCount, dense, total
from megatron_fwpkm.model.block import Block
from megatron_fwpkm.model.context import TokenContext, make_context, places_in_documents
from megatron_fwpkm.model.decoder import BlockStack, Decoder, DecoderLayers, memory_statistics, token_losses
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import Backend, TorchBackend
from megatron_fwpkm.parallel.topology import Topology

Message = tuple[torch.Tensor, ...]
"""What a stage gets and sends: tokens or hidden states alone, or with the documents and positions of the tokens."""

_TIED = "embedding"
"""Key of the weight that the first and the last stage share."""


@dataclass(frozen=True)
class _Flow:
    """What goes from layer to layer within a stage."""

    x: torch.Tensor
    """Tokens [B, T] before the embedding, logits [B, T, V] after the head, hidden states [B, T, E] between them."""
    context: TokenContext


class _Embedding(nn.Module):
    def __init__(self, layers: DecoderLayers) -> None:
        super().__init__()
        self.embedding = layers.embedding()

    def forward(self, flow: _Flow) -> _Flow:
        return replace(flow, x=self.embedding(flow.x))


class _Block(nn.Module):
    def __init__(self, layers: DecoderLayers, index: int) -> None:
        super().__init__()
        self.block = layers.block(index)

    def forward(self, flow: _Flow) -> _Flow:
        return replace(flow, x=self.block(flow.x, flow.context))


class _Norm(nn.Module):
    def __init__(self, layers: DecoderLayers) -> None:
        super().__init__()
        self.norm = layers.norm()

    def forward(self, flow: _Flow) -> _Flow:
        return replace(flow, x=self.norm(flow.x))


class _Head(nn.Module):
    def __init__(self, layers: DecoderLayers) -> None:
        super().__init__()
        self.head = layers.head()

    def forward(self, flow: _Flow) -> _Flow:
        return replace(flow, x=self.head(flow.x))


def _tied_head(head: nn.Module, embedding: _Embedding, flow: _Flow) -> _Flow:
    return replace(flow, x=head(flow.x, embedding.embedding.weight))


def layer_specs(config: DecoderConfig, layers: DecoderLayers) -> list[LayerSpec]:
    """Embedding, blocks, norm and head, to be built where they are needed. The loss follows on the last stage."""
    blocks = [LayerSpec(_Block, layers, index) for index in range(config.layers)]
    if not config.tied_embeddings:
        return [LayerSpec(_Embedding, layers), *blocks, LayerSpec(_Norm, layers), LayerSpec(_Head, layers)]
    tied = partial(TiedLayerSpec, _TIED, _Embedding, layers, tied_weight_attr="embedding.weight")
    return [tied(), *blocks, LayerSpec(_Norm, layers), tied(forward_fn=partial(_tied_head, layers.head()))]


def stage_bounds(flops_of_layers: Sequence[int], stages: int) -> list[int]:
    """Where the stages begin and the last one ends, in the list of `layer_specs`, so that all have about equal work.

    The work is that of each block and then of the head. A stage always has a block, or norm and head together: its
    parameters then have some with weight decay and some without, as DeepSpeed's norm of all gradients requires.
    Raises ValueError for more stages than blocks.
    """
    blocks = len(flops_of_layers) - 1
    if stages > blocks:
        raise ValueError(f"{blocks} blocks can't be divided into {stages} pipeline stages: use at most {blocks}")
    parts = [int(part) for part in partition_balanced(list(flops_of_layers), stages)]
    # The embedding goes with the first block, the norm with the head.
    return [0, *(1 + part for part in parts[1:-1]), blocks + 3]


@dataclass
class StepRecord:
    """What a stage keeps of the microbatches of a step, in order."""

    losses: list[torch.Tensor] = field(default_factory=list)
    """Each one's part of the step's loss; none but on the last stage."""
    statistics: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Of this stage's memories."""


class PipelineDecoder(PipelineModule, BlockStack):  # type: ignore[misc]
    """One stage of a decoder; the layers of all stages together are those of `Decoder` from the same seed.

    In training a call writes to the stage's memories; microbatches pass every stage in order, so memories see the same
    calls as with one stage. A microbatch whose loss or memory statistics are not finite has gradients of NaN on all
    stages: on the way to the last one its hidden states become NaN.
    """

    # Of the base class, whose types are not known.
    parts: list[int]
    forward_funcs: list[Any]
    global_rank: int
    _grid: PipelineParallelGrid
    _topo: ProcessTopology
    _local_start: int
    _set_bounds: Callable[[int, int], None]

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        backend: Backend,
        seed: int,
        topology: Topology,
        sequence_length: int,
        fast_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build this rank's stage; all ranks call this together. `sequence_length` is the one stages are balanced for.

        Raises ValueError for more stages than blocks, RuntimeError if DeepSpeed and Megatron place ranks differently.
        """
        with torch.device("meta"):
            whole = Decoder(config, vocab_size, TorchBackend(), seed)
        self._bounds = stage_bounds(whole.flops_per_token_of_layers(sequence_length), topology.stages)
        sizes = [topology.replicas, topology.stages, topology.tensor_ranks]
        specs = layer_specs(config, DecoderLayers(config, vocab_size, backend, seed, fast_dtype))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it is given
            super().__init__(specs, topology=ProcessTopology(["data", "pipe", "model"], sizes), loss_fn=self._loss)
        check_grid(self._grid)
        self.config, self.vocab_size = config, vocab_size
        self._backend, self._topology = backend, topology
        self._token_shares = backend.tensor_parallel_size if backend.placement.sequence_parallel else 1
        self._whole = (whole,)  # in a tuple: no part of this module
        self._record: StepRecord | None = None
        self._labels, self._loss_scale, self._finite = 1, 1.0, torch.ones(())

    def _partition_layers(self, method: str = "") -> None:
        """Set the bounds of the stages; the base class asks for them while it is made."""
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()

    @property
    def is_last_stage(self) -> bool:
        """Whether this stage has the head and the loss."""
        return self._topology.stage == self._topology.stages - 1

    @contextlib.contextmanager
    def recording(self, labels: int, loss_scale: float) -> Iterator[StepRecord]:
        """Within the context the loss is the sum over a microbatch / labels, times a scale; yields what is recorded."""
        self._record, self._labels, self._loss_scale = StepRecord(), labels, loss_scale
        try:
            yield self._record
        finally:
            self._record = None

    def forward(self, message: Message) -> torch.Tensor | Message:
        """This stage's layers: a message to the next stage's, on the last stage to the logits."""
        x, *rest = message
        documents_BT, positions_BT = rest or (None, None)
        flow = super().forward(_Flow(x, self._context(x, documents_BT, positions_BT)))
        if self._record is not None:
            statistics = memory_statistics(self)
            self._record.statistics.append(statistics)
            self._finite = _all_finite(statistics.values(), flow.x)
        if self.is_last_stage:
            return cast(torch.Tensor, flow.x)
        if self._record is not None and statistics:
            flow = replace(flow, x=flow.x * _nan_unless(self._finite).to(flow.x.dtype))
        return (flow.x.contiguous(), *rest)

    def _context(
        self, x: torch.Tensor, documents_BT: torch.Tensor | None, positions_BT: torch.Tensor | None
    ) -> TokenContext:
        tokens_BT = x
        if x.is_floating_point():
            # Of the tokens, which later stages don't get, only shape and device are asked for.
            tokens_BT = x.new_empty(x.shape[0], x.shape[1] * self._token_shares)
        dtype = next(self.parameters()).dtype
        return make_context(self.config, tokens_BT, dtype, documents_BT=documents_BT, positions_BT=positions_BT)

    def _loss(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        loss_BT = token_losses(self._backend, logits_BTV, labels_BT)
        if self._record is None:
            return loss_BT.double().sum()
        loss = loss_BT.sum() / self._labels
        self._record.losses.append(loss.detach())
        return loss * _nan_unless(self._finite & torch.isfinite(loss.detach())).to(loss.dtype) * self._loss_scale

    def indexed_blocks(self) -> Iterator[tuple[int, Block]]:
        """The blocks of this stage, with their indices in the whole model."""
        for position, layer in enumerate(self.forward_funcs, start=self._local_start):
            if isinstance(layer, _Block):
                yield position - 1, layer.block

    def decoder_name(self, name: str) -> str:
        """The name that a parameter of this module has in a Decoder."""
        place, _, rest = name.partition(".")
        if place == "tied_modules":
            return rest.removeprefix(f"{_TIED}.")
        return rest.replace("block", f"blocks.{int(place) - 1}", 1) if rest.startswith("block.") else rest

    def num_parameters(self) -> ParameterCount:
        """Weights of this rank; an embedding that two stages share is counted on both."""
        blocks = total(block.num_parameters() for _, block in self.indexed_blocks())
        others = [layer for layer in self.children() if not isinstance(layer, _Block)]
        return total((blocks, *(dense(layer) for layer in others)))

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token, of the whole model."""
        return self._whole[0].num_flops_per_token(sequence_length)


def message_of(
    tokens_BT: torch.Tensor, documents_BT: torch.Tensor | None, positions_BT: torch.Tensor | None
) -> Message:
    """The first stage's input. Raises ValueError for positions without documents."""
    if documents_BT is None:
        if positions_BT is not None:
            raise ValueError("positions_BT come with documents_BT in a pipeline; give both or the documents alone")
        return (tokens_BT,)
    if positions_BT is None:
        positions_BT = places_in_documents(documents_BT)
    return (tokens_BT, documents_BT, positions_BT)


def check_grid(grid: PipelineParallelGrid) -> None:
    """Raise RuntimeError unless this rank's groups in DeepSpeed's grid are those that Megatron made."""
    from megatron.core import parallel_state

    pairs = {
        "data": (grid.dp_group, parallel_state.get_data_parallel_group()),
        "pipeline": (grid.pp_group, parallel_state.get_pipeline_model_parallel_group()),
        "tensor": (grid.slice_group, parallel_state.get_tensor_model_parallel_group()),
    }
    for name, (ranks, group) in pairs.items():
        others = torch.distributed.get_process_group_ranks(group)
        if list(ranks) != others:
            raise RuntimeError(
                f"the {name}-parallel group of rank {grid.global_rank} is {list(ranks)} in DeepSpeed's grid and "
                f"{others} in Megatron-Core: their rank orders differ"
            )


def _all_finite(values: Any, like: torch.Tensor) -> torch.Tensor:
    checks = [torch.isfinite(value).all() for value in values]
    return torch.stack(checks).all() if checks else torch.ones((), dtype=torch.bool, device=like.device)


def _nan_unless(condition: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, 1.0, math.nan)
