"""A tiny random model with a memory whose writes matter, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig, DeltaNetConfig
from megatron_fwpkm.parallel.backend import TorchBackend

VOCABULARY = 64
MEMORY = MemoryConfig(heads=1, topk=4, n_subkeys=8, k_dim=8, v_dim=8, chunk_size=16)
CONFIG = DecoderConfig(
    hidden_size=16,
    layers=2,
    mixers=("gated_delta_net", "sliding_attention"),
    attention_heads=2,
    key_value_heads=1,
    head_dim=8,
    window=8,
    delta_net=DeltaNetConfig(key_heads=1, value_heads=1, key_head_dim=8, value_head_dim=8),
    mlp_size=24,
    memory_layers=(1,),
    memory=MEMORY,
    initial_std=0.3,
)


def tiny_decoder(memory: dict[str, Any] | None = None, **changes: Any) -> Decoder:
    """The model of CONFIG with changes of it and of its memory; the same seed always."""
    config = dataclasses.replace(CONFIG, memory=dataclasses.replace(MEMORY, **(memory or {})), **changes)
    model = Decoder(config, VOCABULARY, TorchBackend(config.initial_std), seed=3, fast_dtype=torch.float64)
    return model.double().eval()


def fast_weights(model: Decoder) -> list[torch.Tensor]:
    """Copies of everything that the model's memories hold."""
    return [tensor.clone() for _, state in model.fast_states() for tensor in (state.keys_H2nd, state.values_ND())]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    """Whether they are equal bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
