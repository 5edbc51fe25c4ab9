"""The decoder: a list of layers (embedding, blocks, head), each built under a seed of its own.

Shape legend: B batch, T sequence, E hidden size, V vocabulary (this rank's share under tensor parallelism).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from megatron_fwpkm.memory import FastState, FwPKMLayer
from megatron_fwpkm.model.attention import GatedAttention
from megatron_fwpkm.model.mlp import SwigluMlp
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import Backend


class Block(nn.Module):
    """h += memory(h), where the block has one; h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: DecoderConfig, backend: Backend, memory: FwPKMLayer | None) -> None:
        super().__init__()
        self.memory = memory
        self.attention_norm = backend.norm(config.hidden_size)
        self.attention = GatedAttention(config, backend)
        self.mlp_norm = backend.norm(config.hidden_size)
        self.mlp = SwigluMlp(config.hidden_size, config.mlp_size, backend)

    def forward(self, h_BTE: torch.Tensor) -> torch.Tensor:
        """Residual stream in, residual stream out. The memory layer norms its input itself."""
        if self.memory is not None:
            h_BTE = h_BTE + self.memory(h_BTE)
        h_BTE = h_BTE + self.attention(self.attention_norm(h_BTE))
        return h_BTE + self.mlp(self.mlp_norm(h_BTE))

    def num_parameters(self) -> int:
        """Slow weights on this rank."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token."""
        memory = self.memory.num_flops_per_token() if self.memory is not None else 0
        return (
            memory + self.attention.num_flops_per_token(sequence_length) + self.mlp.num_flops_per_token(sequence_length)
        )


class Decoder(nn.Module):
    """Language model over token ids with tied embedding and head."""

    def __init__(self, config: DecoderConfig, vocab_size: int, backend: Backend, seed: int) -> None:
        """Build all layers; the same seed gives the same weights at any tensor-parallel size."""
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self._backend = backend
        with _seeded(seed, 0):
            self.embedding = backend.embedding(vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList()
        for index in range(config.layers):
            with _seeded(seed, 1 + index):
                self.blocks.append(self._build_block(index, seed))
        self.norm = backend.norm(config.hidden_size)
        self.head = backend.head(config.hidden_size, vocab_size)

    def _build_block(self, index: int, seed: int) -> Block:
        config, memory = self.config, None
        if index in config.memory_layers:
            memory = FwPKMLayer(
                config.hidden_size,
                config.memory,
                seed=layer_seed(seed, 1 + index, "fast state"),
                linear=self._backend.linear,
                norm=self._backend.norm,
            )
        return Block(config, self._backend, memory)

    def forward(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats per token, float32 [B, T], of predicting labels after tokens."""
        return self._backend.cross_entropy(self.logits(tokens_BT), labels_BT)

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, [B, T, V]."""
        h_BTE = self.embedding(tokens_BT)
        for block in self.blocks:
            h_BTE = block(h_BTE)
        return self.head(self.norm(h_BTE), self.embedding.weight)

    def memory_layers(self) -> Iterator[tuple[int, FwPKMLayer]]:
        """(index of the block, memory layer) of every block that has one, in order."""
        for index, block in enumerate(self.blocks):
            memory = block.memory
            if memory is not None:
                yield index, cast(FwPKMLayer, memory)

    def fast_states(self) -> Iterator[tuple[int, FastState]]:
        """(index of the block, fast state) of every block that has a memory, in order."""
        for index, layer in self.memory_layers():
            yield index, layer.fast_state

    def num_parameters(self) -> int:
        """Slow weights on this rank; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token."""
        head = 6 * self.config.hidden_size * self.vocab_size
        return head + sum(cast(Block, block).num_flops_per_token(sequence_length) for block in self.blocks)


def layer_seed(seed: int, index: int, purpose: str = "weights") -> int:
    """Seed of one layer, from its place in the whole model: the same wherever the layer is built."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


@contextmanager
def _seeded(seed: int, index: int) -> Iterator[None]:
    """Draw one layer's initial weights from a seed of its own; the generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layer_seed(seed, index))
        yield
