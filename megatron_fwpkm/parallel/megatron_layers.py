"""Megatron-Core's parallel layers behind the Backend interface. Import only where Megatron is used.

How the gradient of each kind of parameter becomes whole on the tensor-parallel ranks, before the optimizer sees it:

    split weights (column, row, embedding, head, split_parameter)   a rank has all tokens of its own rows or columns
    norms of the residual stream, plain tensor parallelism          all ranks have all tokens: equal already
    the same, row biases, sequence parallelism                      summed in autograd: see `_sum_gradient`
    share_norm, share_linear                                        summed in autograd

Nothing is left for the optimizer to add, so it holds under every ZeRO stage and in a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import nn

from megatron_fwpkm.memory.norms import RMSNorm
from megatron_fwpkm.memory.placement import ALONE, Placement
from megatron_fwpkm.model.delta_rule import DeltaRule
from megatron_fwpkm.parallel.backend import Initialize, choose_delta_rule, plain_linear, widen


def _sum_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter; in the backward pass its gradient is summed over the tensor-parallel ranks, once."""
    return tensor_parallel.copy_to_tensor_model_parallel_region(parameter)


class BatchFirst:
    """Mixin before one of Megatron's layers: [batch, sequence, features] in and out, the output alone.

    Megatron's layers return (output, bias not added), and with `sequence_parallel` they gather and scatter tokens
    along the first dimension.
    """

    sequence_parallel: bool

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Map activations."""
        if self.sequence_parallel:
            x = x.transpose(0, 1).contiguous()
        output, bias = super().forward(x, **options)  # type: ignore[misc]
        if bias is not None:  # of this rank's tokens
            output = output + (_sum_gradient(bias) if self.sequence_parallel else bias)
        return output.transpose(0, 1) if self.sequence_parallel else output  # type: ignore[no-any-return]


class _ColumnLinear(BatchFirst, tensor_parallel.ColumnParallelLinear):
    pass


class _RowLinear(BatchFirst, tensor_parallel.RowParallelLinear):
    pass


class _Head(_ColumnLinear):
    """Called with (hidden, weight)."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, weight=weight)


class _Embedding(tensor_parallel.VocabParallelEmbedding):
    """With `sequence_parallel` a rank gets its tokens of each sequence."""

    @property
    def sequence_parallel(self) -> bool:
        return bool(self.reduce_scatter_embeddings)

    @sequence_parallel.setter
    def sequence_parallel(self, divided: bool) -> None:
        self.reduce_scatter_embeddings = divided

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        output = super().forward(tokens_BT)
        return output.transpose(0, 1) if self.sequence_parallel else output


class _ShareNorm(RMSNorm):
    """Each rank's tokens or heads contribute a part of the weight's gradient."""

    def scale(self) -> torch.Tensor:
        return _sum_gradient(super().scale())


class _ShareLinear(nn.Linear):
    """Each rank's tokens contribute a part of the gradients of weight and bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else _sum_gradient(self.bias)
        return nn.functional.linear(x, _sum_gradient(self.weight), bias)


class MegatronBackend:
    """Layers split over Megatron's tensor-parallel group.

    Weights are drawn on the CPU as one whole matrix from torch's default generator, of which each rank keeps its
    part: the model starts the same at every tensor-parallel size.
    """

    _column_class: Callable[..., nn.Module] = _ColumnLinear
    _row_class: Callable[..., nn.Module] = _RowLinear

    def __init__(self, initial_std: float, norm_epsilon: float, placement: Placement = ALONE) -> None:
        self._initial_std = initial_std
        self._norm_epsilon = norm_epsilon
        if placement.tensor_ranks != self.tensor_parallel_size:
            raise ValueError(
                f"a placement of {placement.tensor_ranks} tensor-parallel ranks in a group of "
                f"{self.tensor_parallel_size}; give the placement of the topology"
            )
        self._placement = placement
        self._config = ModelParallelConfig(**self._config_values())
        self._layer_config = self._config

    def _config_values(self) -> dict[str, Any]:
        return {
            "tensor_model_parallel_size": self.tensor_parallel_size,
            "sequence_parallel": self._placement.sequence_parallel,
            "use_cpu_initialization": True,
            "perform_initialization": True,
            "params_dtype": torch.float32,
            "gradient_accumulation_fusion": False,
        }

    @property
    def tensor_parallel_size(self) -> int:
        """Size of Megatron's tensor-parallel group."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

    @property
    def placement(self) -> Placement:
        """As given."""
        return self._placement

    def _initialize(self, weight: torch.Tensor) -> torch.Tensor:
        return nn.init.normal_(weight, std=self._initial_std)

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """Column-parallel layer that keeps its share of the output."""
        return self._column_class(
            in_features,
            out_features,
            config=self._layer_config,
            init_method=self._initialize,
            bias=bias,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
        )

    def row_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """Row-parallel layer on an input that is split already."""
        return self._row_class(
            in_features,
            out_features,
            config=self._layer_config,
            init_method=self._initialize,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,  # BatchFirst adds it
            is_expert=False,
        )

    def share_linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        """A plain layer, the same on every rank, whose gradients are summed over the ranks that divide the tokens."""
        kind = _ShareLinear if self._placement.tensor_ranks > 1 else nn.Linear
        return plain_linear(in_features, out_features, bias, self._initialize, kind)

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """VocabParallelEmbedding."""
        return _Embedding(
            vocab_size,
            hidden_size,
            config=self._config,
            init_method=self._initialize,
            reduce_scatter_embeddings=self._placement.sequence_parallel,
        )

    def head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        """ColumnParallelLinear on the embedding's weight."""
        return _Head(
            hidden_size,
            vocab_size,
            config=self._config,
            init_method=self._initialize,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=True,
        )

    def norm(self, size: int) -> nn.Module:
        """Zero-centred RMSNorm, the same on every rank."""
        return self.share_norm(size) if self._placement.sequence_parallel else RMSNorm(size, self._norm_epsilon)

    def share_norm(self, size: int, zero_centred: bool = True) -> nn.Module:
        """RMSNorm whose weight's gradient is summed over the ranks."""
        return _ShareNorm(size, self._norm_epsilon, zero_centred=zero_centred)

    def split_parameter(self, shape: tuple[int, ...], initialize: Initialize) -> nn.Parameter:
        """Drawn as a whole on the CPU, of which each rank keeps its rows."""
        if shape[0] % self.tensor_parallel_size:
            raise ValueError(f"{shape[0]} rows can't be split over {self.tensor_parallel_size} tensor-parallel ranks")
        whole = initialize(torch.empty(shape))
        rank = parallel_state.get_tensor_model_parallel_rank()
        parameter = nn.Parameter(whole.chunk(self.tensor_parallel_size)[rank].clone())
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def delta_rule(self) -> DeltaRule:
        """The rule that fits this machine, on this rank's heads."""
        return choose_delta_rule()

    def whole_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """Gathered over the ranks."""
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)

    def cross_entropy(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Vocabulary-parallel cross entropy in float32; float32 logits are overwritten.

        Megatron's function rounds float64 to float32: such logits, of comparisons, are gathered instead.
        """
        if logits_BTV.dtype == torch.float64:
            whole = self.whole_vocabulary(logits_BTV)
            loss = nn.functional.cross_entropy(whole.flatten(0, 1), labels_BT.flatten(), reduction="none")
            return loss.view_as(labels_BT)
        # In the order in which the logits lie in memory: with sequence parallelism the head made them sequence first.
        swapped = not logits_BTV.is_contiguous() and logits_BTV.transpose(0, 1).is_contiguous()
        if swapped:
            logits_BTV, labels_BT = logits_BTV.transpose(0, 1), labels_BT.t()
        loss = tensor_parallel.vocab_parallel_cross_entropy(widen(logits_BTV).contiguous(), labels_BT.contiguous())
        return loss.t() if swapped else loss
