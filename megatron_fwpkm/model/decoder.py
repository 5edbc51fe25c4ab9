"""The decoder: a list of layers (embedding, blocks, head), each built under a seed of its own.

Shape legend: B batch, T sequence, E hidden size, V vocabulary (this rank's share under tensor parallelism).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import nn

from megatron_fwpkm.accounting import ParameterCount, dense, total
from megatron_fwpkm.data.batch import IGNORED_LABEL
from megatron_fwpkm.memory import FastState, FwPKMLayer, PKMLayer
from megatron_fwpkm.memory.column_layer import ColumnFwPKMLayer
from megatron_fwpkm.model.attention import GatedAttention
from megatron_fwpkm.model.block import Block
from megatron_fwpkm.model.cache import DecoderCache
from megatron_fwpkm.model.context import TokenContext, make_context
from megatron_fwpkm.model.settings import DecoderConfig, YarnConfig
from megatron_fwpkm.parallel.backend import Backend


class DecoderLayers:
    """Builds the layers of a decoder, each under a seed of its own: the same whichever of them are built, and where."""

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        backend: Backend,
        seed: int,
        fast_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._config, self._vocab_size, self._backend = config, vocab_size, backend
        self._seed, self._fast_dtype = seed, fast_dtype

    def embedding(self) -> nn.Module:
        """The token embedding."""
        with _seeded(self._seed, 0):
            return self._backend.embedding(self._vocab_size, self._config.hidden_size)

    def block(self, index: int) -> Block:
        """The block of an index, from 0."""
        with _seeded(self._seed, 1 + index):
            memory = self._memory(index) if index in self._config.memory_layers else None
            return Block(self._config, index, self._backend, memory)

    def _memory(self, index: int) -> FwPKMLayer:
        config, backend, placement = self._config, self._backend, self._backend.placement
        fast: Any = {"seed": layer_seed(self._seed, 1 + index, "fast state"), "dtype": self._fast_dtype}
        if placement.sharding == "columns" and placement.memory_ranks > 1:
            return ColumnFwPKMLayer(config.hidden_size, config.memory, placement, backend, **fast)
        layers: Any = {"linear": backend.share_linear, "norm": backend.share_norm}
        return FwPKMLayer(config.hidden_size, config.memory, placement=placement, **layers, **fast)

    def norm(self) -> nn.Module:
        """The norm before the head."""
        return self._backend.norm(self._config.hidden_size)

    def head(self) -> nn.Module:
        """The output layer; with tied embeddings one without a weight, which is given the embedding's at the call."""
        config = self._config
        if config.tied_embeddings:
            return self._backend.head(config.hidden_size, self._vocab_size)
        with _seeded(self._seed, 1 + config.layers):
            return self._backend.column_linear(config.hidden_size, self._vocab_size)


class BlockStack(nn.Module):
    """What training and measuring ask of a model's blocks: of all of them, or of those of this rank's stage."""

    config: DecoderConfig
    vocab_size: int
    _limit_full_attention = False

    def indexed_blocks(self) -> Iterator[tuple[int, Block]]:
        """(index in the whole model, block) of every block here, in order."""
        raise NotImplementedError

    @property
    def limit_full_attention(self) -> bool:
        """Whether full-attention layers use the sliding window for now (pSWA); may be set at any time."""
        return self._limit_full_attention

    @limit_full_attention.setter
    def limit_full_attention(self, limited: bool) -> None:
        self._limit_full_attention = limited
        for _, block in self.indexed_blocks():
            if isinstance(block.mixer, GatedAttention):
                block.mixer.limited = limited

    def recompute_sublayers(self, recompute: bool) -> None:
        """Whether the blocks' mixers and MLPs compute again in the backward pass instead of keeping what they need."""
        for _, block in self.indexed_blocks():
            block.recompute = recompute

    def memory_layers(self) -> Iterator[tuple[int, FwPKMLayer]]:
        """(index of the block, memory layer) of every block that has one, in order."""
        for index, block in self.indexed_blocks():
            if block.memory is not None:
                yield index, block.memory

    def spread_layers(self) -> Iterator[tuple[str, FwPKMLayer | PKMLayer]]:
        """(tag of its metrics, layer) of every memory with fast or slow values, which may be spread over ranks."""
        for index, block in self.indexed_blocks():
            if block.memory is not None:
                yield f"memory/block_{index}", block.memory
            if isinstance(block.mlp, PKMLayer):
                yield f"pkm/block_{index}", block.mlp

    def fast_states(self) -> Iterator[tuple[int, FastState]]:
        """(index of the block, fast state) of every block that has a memory, in order."""
        for index, layer in self.memory_layers():
            yield index, layer.fast_state

    def num_parameters(self) -> ParameterCount:
        """Weights of this rank."""
        raise NotImplementedError

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token, of the whole model."""
        raise NotImplementedError


class Decoder(BlockStack):
    """Language model over token ids."""

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        backend: Backend,
        seed: int,
        fast_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build all layers; the same seed gives the same weights at any tensor-parallel size.

        `fast_dtype` is that of the fast states: float64 in comparisons only. Under `torch.device("meta")` the
        model has shapes and costs but no values.
        """
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self._backend = backend
        self._whole_sequences = False
        layers = DecoderLayers(config, vocab_size, backend, seed, fast_dtype)
        self.embedding = layers.embedding()
        self.blocks = nn.ModuleList(layers.block(index) for index in range(config.layers))
        self.norm = layers.norm()
        self.head = layers.head()

    def indexed_blocks(self) -> Iterator[tuple[int, Block]]:
        """All blocks."""
        for index, block in enumerate(self.blocks):
            yield index, cast(Block, block)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross entropy in nats per token, float32 [B, T], of predicting labels after tokens; 0 where ignored."""
        logits_BTV = self.logits(tokens_BT, documents_BT=documents_BT, positions_BT=positions_BT)
        return self.cross_entropy(logits_BTV, labels_BT)

    def cross_entropy(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """As forward(), from logits: float32 [B, T] (float64 of float64 logits in TorchBackend), 0 at IGNORED_LABEL.

        The logits may be overwritten: Megatron's function computes in place.
        """
        return token_losses(self._backend, logits_BTV, labels_BT)

    def logits(
        self,
        tokens_BT: torch.Tensor,
        *,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> torch.Tensor:
        """Scores of the next token, [B, T, V].

        `documents_BT` numbers the documents of each sequence: mixers start anew at each of them, memories by their
        reset policy. `positions_BT` are RoPE's. `mask_BT` is true for real tokens, false for padding. With a
        cache the tokens continue its streams, without gradients. Raises ValueError for what does not fit together.
        With sequence parallelism T is a multiple of the tensor-parallel ranks and there is no cache: see
        `whole_sequences`.
        """
        if self.sequence_parallel and (cache is not None or tokens_BT.shape[1] % self._backend.tensor_parallel_size):
            raise ValueError(
                f"with sequence parallelism {self._backend.tensor_parallel_size} ranks divide every sequence: this "
                f"call has {tokens_BT.shape[1]} tokens and {'a' if cache is not None else 'no'} cache; call within "
                "whole_sequences()"
            )
        dtype = cast(torch.Tensor, self.embedding.weight).dtype
        past_B = None
        if cache is not None:
            cache.check_batch(tokens_BT.shape[0])
            past_B = cache.real_tokens_B
            if past_B is None:
                past_B = torch.zeros(tokens_BT.shape[0], dtype=torch.int64, device=tokens_BT.device)
        context = make_context(
            self.config,
            tokens_BT,
            dtype,
            documents_BT=documents_BT,
            positions_BT=positions_BT,
            mask_BT=mask_BT,
            past_B=past_B,
        )
        with nullcontext() if cache is None else torch.no_grad():
            h_BTE = self._run_blocks(self.embedding(tokens_BT), context, cache)
            if cache is not None:
                cache.count(tokens_BT, mask_BT)
            if self.config.tied_embeddings:
                return self.head(self.norm(h_BTE), self.embedding.weight)
            return self.head(self.norm(h_BTE))

    def whole_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., V] of logits, of which each tensor-parallel rank has its share; they call it together."""
        return self._backend.whole_vocabulary(logits)

    def _run_blocks(self, h_BTE: torch.Tensor, context: TokenContext, cache: DecoderCache | None) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            h_BTE = block(h_BTE, context, None if cache is None else cache.layers[index])
        return h_BTE

    def make_cache(
        self,
        batch: int,
        *,
        mode: Literal["aligned", "official"] | None = None,
        memory: Literal["per_sequence", "shared"] | None = None,
    ) -> DecoderCache:
        """Empty streams of `batch` sequences whose memories start from the fast states as they are now.

        `mode` and `memory` as `MemoryCache` has them; None takes the configuration's.
        """
        blocks = [cast(Block, block) for block in self.blocks]
        memories = [
            None if block.memory is None else block.memory.make_cache(batch, mode=mode, memory=memory)
            for block in blocks
        ]
        return DecoderCache(batch, [block.mixer.make_cache for block in blocks], memories)

    @property
    def rope_scaling(self) -> YarnConfig | None:
        """RoPE for longer contexts; may be set at any time. Caches made before keep keys of the old angles."""
        return self.config.rope_scaling

    @rope_scaling.setter
    def rope_scaling(self, scaling: YarnConfig | None) -> None:
        self.config = dataclasses.replace(self.config, rope_scaling=scaling)

    @property
    def sequence_parallel(self) -> bool:
        """Whether tensor-parallel ranks divide the tokens between the split layers among them."""
        return self._backend.placement.sequence_parallel and not self._whole_sequences

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Within the context every tensor-parallel rank has all tokens, as caches and lengths of any kind need it.

        Without gradients: layers choose how to make them whole when they are built.
        """
        divided = [module for module in self.modules() if getattr(module, "sequence_parallel", None) is True]
        layers: list[Any] = [module for module in divided if module is not self]
        was_whole, self._whole_sequences = self._whole_sequences, True
        try:
            for layer in layers:
                layer.sequence_parallel = False
            with torch.no_grad():
                yield
        finally:
            for layer in layers:
                layer.sequence_parallel = True
            self._whole_sequences = was_whole

    def num_parameters(self) -> ParameterCount:
        """Weights of this rank."""
        blocks = total(cast(Block, block).num_parameters() for block in self.blocks)
        return total((self.num_parameters_of_ends(), blocks, dense(self.norm)))

    def num_parameters_of_ends(self) -> ParameterCount:
        """Weights of embedding and head; a tied embedding counts once, of an untied one a token takes one row."""
        embedding = dense(self.embedding)
        if not self.config.tied_embeddings:
            embedding = dataclasses.replace(embedding, active_per_token=self.config.hidden_size)
        return embedding + dense(self.head)

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token, of the whole model."""
        return sum(self.flops_per_token_of_layers(sequence_length))

    def flops_per_token_of_layers(self, sequence_length: int) -> list[int]:
        """As num_flops_per_token(), of each block and then of the head; looking a token up counts as nothing."""
        blocks = [block.num_flops_per_token(sequence_length) for _, block in self.indexed_blocks()]
        return [*blocks, 6 * self.config.hidden_size * self.vocab_size]


def memory_statistics(model: BlockStack) -> dict[str, torch.Tensor]:
    """Statistics of the last forward pass of every memory layer, by tag: single numbers and histograms."""
    return {
        f"memory/block_{index}/{name}": value.detach().float()
        for index, layer in model.memory_layers()
        for name, value in sorted(layer.statistics().items())
    }


def token_losses(backend: Backend, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats per token, float32 or wider [B, T]; 0 where ignored. The logits may be overwritten."""
    ignored_BT = labels_BT == IGNORED_LABEL
    # Vocabulary-parallel ranks take a label outside their share for one of another rank: none may see -100.
    loss_BT = backend.cross_entropy(logits_BTV, labels_BT.masked_fill(ignored_BT, 0))
    return loss_BT.masked_fill(ignored_BT, 0)


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
