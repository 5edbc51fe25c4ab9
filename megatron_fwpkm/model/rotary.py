"""Rotary position embedding (RoPE), partial and half-split, with YaRN for longer contexts (semantics E).

Shape legend: B batch, T sequence, H heads, D head width, R rotated width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_fwpkm.model.settings import DecoderConfig, YarnConfig


@dataclass(frozen=True)
class RotaryTables:
    """Cosine and sine of RoPE's angles, halves repeated: [T, 1, R], or [B, T, 1, R] where sequences differ."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def rotate(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """Turn the first R features of each head; the rest passes unchanged."""
        width = self.cosine.shape[-1]
        turned, kept = x_BTHD[..., :width], x_BTHD[..., width:]
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
        return torch.cat([turned * self.cosine + swapped * self.sine, kept], dim=-1)


def rotary_tables(config: DecoderConfig, positions: torch.Tensor, dtype: torch.dtype) -> RotaryTables:
    """Tables for positions [T] or [B, T]; angles are computed in float32, in float64 for a float64 model."""
    frequency_F, factor = rotary_frequencies(config.rotary_dim, config.rotary_base, config.rope_scaling)
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide).unsqueeze(-1) * frequency_F.to(positions.device, wide)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return RotaryTables((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


def rotary_frequencies(width: int, base: float, scaling: YarnConfig | None) -> tuple[torch.Tensor, float]:
    """Radians per token of each of the width / 2 pairs, float32 whatever the model's dtype, and the tables' factor.

    The reference cases were made with float32 frequencies; wider ones would move angles by 3e-8.
    """
    period = base ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    frequency = 1.0 / period
    if scaling is None:
        return frequency, 1.0
    kept = 1 - _ramp(width, base, scaling)
    slowed = 1.0 / (scaling.factor * period)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0
    return slowed * (1 - kept) + frequency * kept, factor


def _ramp(width: int, base: float, scaling: YarnConfig) -> torch.Tensor:
    """How far each pair is slowed down, from 0 for those that turn often over the original length to 1."""

    def pair_that_turns(times: float) -> float:
        return width * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    span = high - low if high != low else 0.001
    return ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
