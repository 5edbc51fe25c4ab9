"""The FwPKM sublayer where every rank has some columns of all slots (placement.sharding "columns").

The value is projected to a rank's columns by a column-parallel layer, and the output from them by a row-parallel one;
z-score and output norm add up their moments over the ranks. Queries and gates are of each rank's own tokens; gates
then go to all ranks.

Letters: as in fwpkm_layer.py; R ranks, N sequences or documents of a call, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fwpkm.memory.cache import MemoryCache
from megatron_fwpkm.memory.chunk import ChunkSpan
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.division import TokenDivision
from megatron_fwpkm.memory.fwpkm_layer import FwPKMLayer, zscore
from megatron_fwpkm.memory.inputs import check_loss_mask
from megatron_fwpkm.memory.placement import Placement
from megatron_fwpkm.memory.sharding import column_share
from megatron_fwpkm.memory.tokens import added_over, summed_over
from megatron_fwpkm.memory.whole_state import WholeState


class ColumnLayers(Protocol):
    """Maker of a column layer's parts: the model's provider of parallel layers."""

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """Output features split over the ranks; its output has all tokens."""

    def row_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """Input features split over the ranks; its output has all features."""

    def share_linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        """Whole features of divided tokens."""

    def share_norm(self, size: int, zero_centred: bool = True) -> nn.Module:
        """RMS norm of whole features of divided tokens."""

    def norm(self, size: int) -> nn.Module:
        """RMS norm of the residual stream."""

    def split_parameter(self, shape: tuple[int, ...], initialize: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """This rank's share of a parameter."""


class ColumnNorm(nn.Module):
    """The zero-centred RMSNorm of rows whose columns are spread over ranks."""

    def __init__(self, size: int, weight: nn.Parameter, group: dist.ProcessGroup, epsilon: float) -> None:
        super().__init__()
        self.size, self.weight, self.epsilon, self._group = size, weight, epsilon, group

    def forward(self, x: Tensor) -> Tensor:
        """[..., D / R]; the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = added_over(wide.square().sum(-1, keepdim=True), self._group) / self.size
        return (wide * torch.rsqrt(mean + self.epsilon) * (1 + self.weight.to(wide.dtype))).to(x.dtype)


@dataclass(frozen=True)
class _Call:
    """One call: its tokens' numbers, how many queries of a sequence this rank has, and the targets' places in L."""

    tokens_NL: Tensor
    queries: int
    targets: Tensor
    spans: list[ChunkSpan]


class ColumnDivision(TokenDivision):
    """Queries divided as in `TokenDivision`; vectors of all tokens."""

    def __init__(
        self,
        calls: list[Tensor],
        shape: tuple[int, int],
        config: MemoryConfig,
        placement: Placement,
        device: torch.device,
    ) -> None:
        super().__init__(calls, shape, config, placement, device)
        self.column_calls: list[_Call] = []
        for tokens_NL in calls:
            share = column_share(tokens_NL.shape[1], config, placement.tensor_rank, placement.tensor_ranks)
            self.column_calls.append(_Call(tokens_NL.to(device), len(share.own), share.targets.to(device), share.spans))
        number = [call.tokens_NL.flatten() for call in self.column_calls]
        order = torch.cat([torch.empty(0, dtype=torch.int64, device=device), *number])
        self.inverse = torch.empty_like(order)
        self.inverse[order] = torch.arange(order.numel(), device=device)


class ColumnFwPKMLayer(FwPKMLayer):
    """As `FwPKMLayer`, with columns of all slots on each tensor-parallel rank.

    Args:
        layers: makes its projections and norms
    """

    def __init__(
        self,
        hidden_size: int,
        config: MemoryConfig,
        placement: Placement,
        layers: ColumnLayers,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._layers = layers
        super().__init__(
            hidden_size,
            config,
            seed=seed,
            linear=layers.share_linear,
            norm=layers.share_norm,
            dtype=dtype,
            placement=placement,
        )
        del self._layers

    def _build_value(self, linear: Callable[..., nn.Module], norm: Callable[[int], nn.Module]) -> None:
        self.value_norm = self._layers.norm(self.hidden_size)
        self.value_projection = self._layers.column_linear(self.hidden_size, self.config.v_dim, bias=True)

    def _build_output(self, linear: Callable[..., nn.Module], norm: Callable[[int], nn.Module]) -> None:
        group, epsilon = self.placement.tensor_group, getattr(self.query_norm, "epsilon", 1e-5)
        assert group is not None, "columns are spread over tensor-parallel ranks"
        weight = self._layers.split_parameter((self.config.v_dim,), nn.init.zeros_)
        self.output_norm = ColumnNorm(self.config.v_dim, weight, group, epsilon)
        self.output_projection = self._layers.row_linear(self.config.v_dim, self.hidden_size, bias=True)

    def _make_division(self, calls: list[Tensor], shape: tuple[int, int], device: torch.device) -> ColumnDivision:
        return ColumnDivision(calls, shape, self.config, self._placement_now(), device)

    def _value(self, hidden: Tensor) -> Tensor:
        """[..., D / R] of hidden states [..., E]; of all tokens where the column layer gathers them."""
        value = self.value_projection(self.value_norm(hidden))
        return zscore(value, self.config.v_dim, self.placement.tensor_group) if self.config.normalize_value else value

    def _output(self, read: Tensor, value: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """As the base class's, of columns: each rank's contribute a part of the gate's gradient."""
        return super()._output(read, value, summed_over(gate, self.placement.tensor_group), dtype)

    def _forward_divided(self, hidden_BTE: Tensor, mask_BT: Tensor | None, documents_BT: Tensor | None) -> Tensor:
        """Queries of own tokens, vectors of all, in this rank's columns."""
        if self.trace is not None:
            raise ValueError("a trace is of one call on one rank: set trace = None for divided tokens or documents")
        shape = self._batch_shape(hidden_BTE)
        check_loss_mask(mask_BT, shape)
        division = self._divide(hidden_BTE, documents_BT)
        assert isinstance(division, ColumnDivision)
        rows_XE = division.enter(hidden_BTE.flatten(0, 1))
        query_YHk = division.to_own(self._query(rows_XE))
        gate_BT = division.to_all(self._gate(rows_XE).unsqueeze(1)).view(shape)
        value_BTD = self._value(hidden_BTE)
        read_BTD = torch.zeros_like(value_BTD)
        if self.memory_reads:
            read_BTD = self._remember_columns(query_YHk, value_BTD, gate_BT, mask_BT, division)
        return self._output(read_BTD, value_BTD, gate_BT, hidden_BTE.dtype)

    def _remember_columns(
        self,
        query_YHk: Tensor,
        value_BTD: Tensor,
        gate_BT: Tensor,
        mask_BT: Tensor | None,
        division: ColumnDivision,
    ) -> Tensor:
        value_XD, gate_X = value_BTD.flatten(0, 1), gate_BT.flatten()
        queries = query_YHk.split([call.tokens_NL.shape[0] * call.queries for call in division.column_calls])
        reads = [value_XD[:0]]
        with self._counted_together():
            for call, query in zip(division.column_calls, queries, strict=True):
                batch = call.tokens_NL.shape[0]
                read = self._call_memory(
                    query.unflatten(0, (batch, call.queries)),
                    value_XD[call.tokens_NL[:, call.targets]],
                    gate_X[call.tokens_NL],
                    None if mask_BT is None else mask_BT.flatten()[call.tokens_NL],
                    call.spans,
                )
                reads.append(read.flatten(0, 1))
        return torch.cat(reads)[division.inverse].view_as(value_BTD)

    def _recall(self, cache: MemoryCache, query: Tensor, value: Tensor, gate: Tensor, mask: Tensor | None) -> Tensor:
        """The cache has whole rows, on all ranks."""
        state = cache.view.base
        assert isinstance(state, WholeState)
        return state.own_columns(cache(query, state.all_columns(value), gate, mask))
