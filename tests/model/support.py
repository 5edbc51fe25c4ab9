"""Small models for the model's tests."""

from __future__ import annotations

from typing import Any

import torch

from megatron_fwpkm.memory import MemoryConfig, PKMConfig
from megatron_fwpkm.model.context import TokenContext, make_context
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import MIXERS, DecoderConfig, DeltaNetConfig
from megatron_fwpkm.parallel.backend import TorchBackend

MEMORY = MemoryConfig(heads=1, topk=4, n_subkeys=16, k_dim=16, v_dim=16, chunk_size=8)
VOCABULARY = 64


def small_config(**changes: Any) -> DecoderConfig:
    """One block of each mixer, unless changed."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "layers": 3,
        "mixers": MIXERS,
        "attention_heads": 4,
        "key_value_heads": 2,
        "head_dim": 8,
        "rotary_fraction": 0.5,
        "mlp_size": 48,
        "window": 8,
        "delta_net": DeltaNetConfig(key_heads=2, value_heads=4, key_head_dim=8, value_head_dim=6),
        "memory": MEMORY,
        "pkm": PKMConfig(heads=2, topk=4, n_subkeys=8, k_dim=16, v_dim=12),
    }
    return DecoderConfig(**{**sizes, **changes})


def small_decoder(dtype: torch.dtype = torch.float64, seed: int = 1, std: float = 0.2, **changes: Any) -> Decoder:
    """Large initial weights, so that what is wrong shows."""
    backend = TorchBackend(initial_std=std)
    return Decoder(small_config(**changes), VOCABULARY, backend, seed, fast_dtype=dtype).to(dtype)


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_context(config: DecoderConfig, x_BTE: torch.Tensor) -> TokenContext:
    """One text for each sequence, no padding."""
    return make_context(config, torch.zeros(x_BTE.shape[:2], dtype=torch.int64), x_BTE.dtype)


def numbered(*rows: list[int]) -> torch.Tensor:
    """Documents from their lengths: [[3, 2], [5]] to [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in rows])
