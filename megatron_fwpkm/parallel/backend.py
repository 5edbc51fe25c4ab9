"""The one place that chooses which library's layers the model is built of.

Model code asks a Backend for layers and never names a library. Shapes: activations are [batch, sequence, features];
on a tensor-parallel rank the features between a column- and a row-parallel layer are that rank's share.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from megatron_fwpkm.memory.norms import RMSNorm


class Backend(Protocol):
    """Provider of the layers that a decoder is built of."""

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks over which the parallel layers are split."""

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """Linear layer whose output features are split over the tensor-parallel ranks."""

    def row_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """Linear layer whose input features are split; its output is whole on every rank."""

    def linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        """Linear layer with whole input and whole output on every rank."""

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """Token embedding; its `weight` is [vocab_size / ranks, hidden_size]."""

    def head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        """Output layer without a weight of its own: called with (hidden, weight), returns this rank's logits."""

    def norm(self, size: int) -> nn.Module:
        """RMS norm with a zero-centred weight."""

    def cross_entropy(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Cross entropy per token in nats, float32 [B, T], of logits split over the vocabulary."""


class TorchBackend:
    """Plain torch layers in one process: the reference for the others, and for tests without process groups."""

    def __init__(self, initial_std: float = 0.02, norm_epsilon: float = 1e-5) -> None:
        self._initial_std = initial_std
        self._norm_epsilon = norm_epsilon

    @property
    def tensor_parallel_size(self) -> int:
        """Always 1."""
        return 1

    def linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        """torch.nn.Linear with normal weights and zero bias."""
        # Without torch's own initial values: they would advance the random generator.
        layer = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias)
        nn.init.normal_(layer.weight, std=self._initial_std)
        if bias:
            nn.init.zeros_(layer.bias)
        return layer

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """As linear()."""
        return self.linear(in_features, out_features, bias)

    def row_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """As linear()."""
        return self.linear(in_features, out_features, bias)

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """torch.nn.Embedding with normal weights."""
        layer = nn.utils.skip_init(nn.Embedding, vocab_size, hidden_size)
        nn.init.normal_(layer.weight, std=self._initial_std)
        return layer

    def head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        """Product with a weight given at the call."""
        return _TiedHead()

    def norm(self, size: int) -> nn.Module:
        """Zero-centred RMSNorm."""
        return RMSNorm(size, self._norm_epsilon)

    def cross_entropy(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """torch's cross entropy in float32."""
        loss = nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="none")
        return loss.view_as(labels_BT)


class _TiedHead(nn.Module):
    def forward(self, hidden_BTD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_BTD, weight_VD)


def megatron_backend(initial_std: float, norm_epsilon: float) -> Backend:
    """Megatron-Core's parallel layers on the current tensor-parallel group; needs topology.initialize() before."""
    from megatron_fwpkm.parallel.megatron_layers import MegatronBackend

    return MegatronBackend(initial_std, norm_epsilon)
