"""The one place that chooses which library's layers the model is built of.

Model code asks a Backend for layers and never names a library. Shapes: activations are [batch, sequence, features];
on a tensor-parallel rank the features between a column- and a row-parallel layer are that rank's share. With sequence
parallelism the tokens outside such pairs are divided too: each rank has its contiguous share of every sequence, which
embedding and row-parallel layers return, and which column-parallel layers and the head take and make whole.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from megatron_fwpkm.memory.norms import RMSNorm
from megatron_fwpkm.memory.placement import ALONE, Placement

if TYPE_CHECKING:
    from megatron_fwpkm.model.delta_rule import DeltaRule

Initialize = Callable[[torch.Tensor], torch.Tensor]
"""Draws a tensor's values in place, from torch's default generator, and returns it."""


class Backend(Protocol):
    """Provider of the layers that a decoder is built of."""

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks over which the parallel layers are split."""

    @property
    def placement(self) -> Placement:
        """Where tokens and memories are: what a memory layer is told of the layout."""

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """Linear layer whose output features are split over the tensor-parallel ranks; its output has all tokens."""

    def row_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """Linear layer whose input features are split; its output has all features, of the residual stream's tokens."""

    def share_linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        """Linear layer of whole features for tokens that are divided over the tensor-parallel ranks.

        Its weights are the same on every rank; so are their gradients, the sums over all ranks' tokens.
        """

    def share_norm(self, size: int, zero_centred: bool = True) -> nn.Module:
        """RMS norm of whole features for tokens, or heads, that are divided over the tensor-parallel ranks.

        Its weight is the same on every rank; so is its gradient, the sum over all ranks.
        """

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """Token embedding; its `weight` is [vocab_size / ranks, hidden_size]."""

    def head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        """Output layer without a weight of its own: called with (hidden, weight), returns this rank's logits."""

    def norm(self, size: int) -> nn.Module:
        """RMS norm with a zero-centred weight, of the residual stream."""

    def split_parameter(self, shape: tuple[int, ...], initialize: Initialize) -> nn.Parameter:
        """This rank's share, along the first dimension, of a parameter of the given whole shape."""

    def delta_rule(self) -> DeltaRule:
        """The gated delta rule for whole sequences."""

    def whole_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., V] of all ranks' shares [..., V / ranks] of the vocabulary, on every rank."""

    def cross_entropy(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Cross entropy per token in nats, float32 [B, T], of logits split over the vocabulary.

        The logits may be overwritten.
        """


class TorchBackend:
    """Plain torch layers in one process: the reference for the others, and for tests without process groups."""

    def __init__(self, initial_std: float = 0.02, norm_epsilon: float = 1e-5) -> None:
        self._initial_std = initial_std
        self._norm_epsilon = norm_epsilon

    @property
    def tensor_parallel_size(self) -> int:
        """Always 1."""
        return 1

    @property
    def placement(self) -> Placement:
        """Everything on this rank."""
        return ALONE

    def share_linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        """torch.nn.Linear with normal weights and zero bias."""
        return plain_linear(in_features, out_features, bias, self._initialize)

    def _initialize(self, weight: torch.Tensor) -> torch.Tensor:
        return nn.init.normal_(weight, std=self._initial_std)

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """As share_linear()."""
        return self.share_linear(in_features, out_features, bias)

    def row_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """As share_linear()."""
        return self.share_linear(in_features, out_features, bias)

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """torch.nn.Embedding with normal weights."""
        layer = nn.utils.skip_init(nn.Embedding, vocab_size, hidden_size, device=torch.get_default_device())
        self._initialize(layer.weight)
        return layer

    def head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        """Product with a weight given at the call."""
        return _TiedHead()

    def norm(self, size: int) -> nn.Module:
        """Zero-centred RMSNorm."""
        return RMSNorm(size, self._norm_epsilon)

    def share_norm(self, size: int, zero_centred: bool = True) -> nn.Module:
        """As norm(), or with a weight that starts at 1."""
        return RMSNorm(size, self._norm_epsilon, zero_centred=zero_centred)

    def split_parameter(self, shape: tuple[int, ...], initialize: Initialize) -> nn.Parameter:
        """The whole parameter."""
        return nn.Parameter(initialize(torch.empty(shape)))

    def delta_rule(self) -> DeltaRule:
        """The rule that fits this machine."""
        return choose_delta_rule()

    def whole_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return logits

    def cross_entropy(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """torch's cross entropy in float32 or wider."""
        loss = nn.functional.cross_entropy(widen(logits_BTV).flatten(0, 1), labels_BT.flatten(), reduction="none")
        return loss.view_as(labels_BT)


class _TiedHead(nn.Module):
    def forward(self, hidden_BTD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_BTD, weight_VD)


def plain_linear(
    in_features: int, out_features: int, bias: bool, initialize: Initialize, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """torch.nn.Linear, or a kind of it, with drawn weights and zero bias, on the default device."""
    # Without torch's own initial values: they would advance the random generator.
    layer = nn.utils.skip_init(kind, in_features, out_features, bias=bias, device=torch.get_default_device())
    initialize(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def widen(x: torch.Tensor) -> torch.Tensor:
    """In float32, or as it is if wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def installed(package: str) -> bool:
    """Whether a package can be found, without importing it."""
    return importlib.util.find_spec(package) is not None


def choose_delta_rule() -> DeltaRule:
    """flash-linear-attention's kernels where there is a GPU and it is installed, else transformers' plain torch."""
    from megatron_fwpkm.model.delta_rule import chunked_delta_rule, fla_delta_rule

    return fla_delta_rule if torch.cuda.is_available() and installed("fla") else chunked_delta_rule


def megatron_backend(initial_std: float, norm_epsilon: float, placement: Placement = ALONE) -> Backend:
    """Megatron-Core's parallel layers on the current tensor-parallel group; needs topology.initialize() before.

    `placement` is the topology's. Raises ValueError if it is of another number of tensor-parallel ranks.

    Where there is a GPU and Transformer Engine is installed, its linear layers and norms take the place of Megatron's.
    """
    if torch.cuda.is_available() and installed("transformer_engine"):
        from megatron_fwpkm.parallel.transformer_engine_layers import TransformerEngineBackend

        return TransformerEngineBackend(initial_std, norm_epsilon, placement)
    from megatron_fwpkm.parallel.megatron_layers import MegatronBackend

    return MegatronBackend(initial_std, norm_epsilon, placement)
