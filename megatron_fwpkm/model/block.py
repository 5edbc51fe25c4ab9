"""One block of the decoder: an optional memory, a mixer, and an MLP or a product-key memory in its place.

Shape legend: B batch, T sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_fwpkm.accounting import ParameterCount, dense, total
from megatron_fwpkm.memory import FwPKMLayer, PKMLayer
from megatron_fwpkm.model.attention import GatedAttention
from megatron_fwpkm.model.cache import LayerCache
from megatron_fwpkm.model.context import TokenContext
from megatron_fwpkm.model.delta_net import GatedDeltaNet
from megatron_fwpkm.model.mlp import SwigluMlp
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import Backend
from megatron_fwpkm.phase import PHASE


class Block(nn.Module):
    """h += memory(h), where the block has one; h += mixer(norm(h)); h += mlp(norm(h)) (semantics D).

    `mlp` is a PKMLayer in the blocks of `pkm_layers`. The memory layer norms its input itself.
    """

    def __init__(self, config: DecoderConfig, index: int, backend: Backend, memory: FwPKMLayer | None) -> None:
        super().__init__()
        self._index = index
        self.memory = memory
        self.mixer_norm = backend.norm(config.hidden_size)
        self.mixer = _mixer(config, index, backend)
        self.mlp_norm = backend.norm(config.hidden_size)
        self.mlp = _mlp(config, index, backend)
        self.recompute = False
        """Whether mixer and MLP, with their norms, keep their input alone and compute again in the backward pass. The
        memory never does: it writes as it reads."""

    def forward(self, h_BTE: torch.Tensor, context: TokenContext, cache: LayerCache | None = None) -> torch.Tensor:
        """Residual stream in, residual stream out. With a cache the tokens continue its streams."""
        if self.memory is not None:
            with PHASE.at(f"memory of block {self._index}"):
                h_BTE = h_BTE + self.memory(
                    h_BTE, context.mask_BT, None if cache is None else cache.memory, context.documents_BT
                )
        # A block's cache was made by its own mixer, which checks nothing about it.
        mixer_cache: Any = None if cache is None else cache.mixer
        with PHASE.at(f"mixer of block {self._index}"):
            h_BTE = h_BTE + self._sublayer(lambda h: self.mixer(self.mixer_norm(h), context, mixer_cache), h_BTE)
        if isinstance(self.mlp, PKMLayer):
            with PHASE.at(f"product-key memory of block {self._index}"):
                return h_BTE + self.mlp(self.mlp_norm(h_BTE))
        with PHASE.at(f"MLP of block {self._index}"):
            return h_BTE + self._sublayer(lambda h: self.mlp(self.mlp_norm(h)), h_BTE)

    def _sublayer(self, run: Callable[[torch.Tensor], torch.Tensor], h_BTE: torch.Tensor) -> torch.Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return run(h_BTE)
        # Nothing in a sublayer is random.
        return cast(torch.Tensor, checkpoint(run, h_BTE, use_reentrant=False, preserve_rng_state=False))

    def num_parameters(self) -> ParameterCount:
        """Weights of this rank."""
        memory = ParameterCount() if self.memory is None else self.memory.num_parameters()
        parts = (dense(self.mixer_norm), self.mixer.num_parameters(), dense(self.mlp_norm), self.mlp.num_parameters())
        return total((memory, *parts))

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token."""
        memory = 0 if self.memory is None else self.memory.num_flops_per_token(sequence_length)
        mixer = self.mixer.num_flops_per_token(sequence_length)
        return memory + mixer + self.mlp.num_flops_per_token(sequence_length)


def _mixer(config: DecoderConfig, index: int, backend: Backend) -> GatedAttention | GatedDeltaNet:
    kind = config.mixer(index)
    if kind == "gated_delta_net":
        return GatedDeltaNet(config, backend)
    return GatedAttention(config, backend, sliding=kind == "sliding_attention")


def _mlp(config: DecoderConfig, index: int, backend: Backend) -> SwigluMlp | PKMLayer:
    if index in config.pkm_layers:
        # Divided by token and slot, not by feature.
        return PKMLayer(config.hidden_size, config.pkm, linear=backend.share_linear, placement=backend.placement)
    return SwigluMlp(config.hidden_size, config.mlp_size, backend)
