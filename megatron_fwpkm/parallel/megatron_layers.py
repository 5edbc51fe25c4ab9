"""Megatron-Core's parallel layers behind the Backend interface. Import only where Megatron is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import nn

from megatron_fwpkm.memory.norms import RMSNorm
from megatron_fwpkm.model.delta_rule import DeltaRule
from megatron_fwpkm.parallel.backend import Initialize, choose_delta_rule, plain_linear, widen


class _ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """Returns the output alone: Megatron's layers return (output, bias not added)."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        output, _ = super().forward(x, weight=weight)
        return output


class _RowLinear(tensor_parallel.RowParallelLinear):
    """Returns the output alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = super().forward(x)
        return output


class _HeadNorm(RMSNorm):
    """RMSNorm of heads that are split over the ranks.

    Each rank's heads contribute a part of the weight's gradient; the copy's backward pass adds the parts up.
    """

    def scale(self) -> torch.Tensor:
        return tensor_parallel.copy_to_tensor_model_parallel_region(super().scale())


class MegatronBackend:
    """Layers split over Megatron's tensor-parallel group.

    Weights are drawn on the CPU as one whole matrix from torch's default generator, of which each rank keeps its
    part: the model starts the same at every tensor-parallel size.
    """

    _column_class: Callable[..., nn.Module] = _ColumnLinear
    _row_class: Callable[..., nn.Module] = _RowLinear

    def __init__(self, initial_std: float, norm_epsilon: float) -> None:
        self._initial_std = initial_std
        self._norm_epsilon = norm_epsilon
        self._config = ModelParallelConfig(
            tensor_model_parallel_size=self.tensor_parallel_size,
            use_cpu_initialization=True,
            perform_initialization=True,
            params_dtype=torch.float32,
            gradient_accumulation_fusion=False,
            async_tensor_model_parallel_allreduce=False,
        )
        self._layer_config = self._config

    @property
    def tensor_parallel_size(self) -> int:
        """Size of Megatron's tensor-parallel group."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

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
            skip_bias_add=False,
            is_expert=False,
        )

    def linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        """A plain layer, the same on every rank: its input is, so its gradients are too, and nothing is gathered."""
        return plain_linear(in_features, out_features, bias, self._initialize)

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """VocabParallelEmbedding."""
        return tensor_parallel.VocabParallelEmbedding(
            vocab_size, hidden_size, config=self._config, init_method=self._initialize
        )

    def head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        """ColumnParallelLinear on the embedding's weight."""
        return _ColumnLinear(
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
        return RMSNorm(size, self._norm_epsilon)

    def head_norm(self, size: int, zero_centred: bool = True) -> nn.Module:
        """RMSNorm whose weight's gradient is summed over the ranks."""
        return _HeadNorm(size, self._norm_epsilon, zero_centred=zero_centred)

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

    def cross_entropy(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Vocabulary-parallel cross entropy, float32 whatever the logits are; float32 logits are overwritten."""
        return tensor_parallel.vocab_parallel_cross_entropy(widen(logits_BTV), labels_BT)
