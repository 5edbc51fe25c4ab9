"""Gated sliding-window attention with QK-norm and partial RoPE.

Shape legend: B batch, T sequence, H query heads, D head width, W window, M blocks of W tokens.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import Backend


def rotary_tables(length: int, width: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of RoPE's angles, float32 [length, width], halves repeated."""
    inverse_frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse_frequency)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTD: torch.Tensor, cosine_TR: torch.Tensor, sine_TR: torch.Tensor) -> torch.Tensor:
    """Apply RoPE (half-split) to the first R features of each head; the rest passes unchanged."""
    width = cosine_TR.shape[-1]
    turned, kept = x_BHTD[..., :width], x_BHTD[..., width:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    turned = turned * cosine_TR.to(x_BHTD.dtype) + swapped * sine_TR.to(x_BHTD.dtype)
    return torch.cat([turned, kept], dim=-1)


def windowed_attention(
    q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Causal softmax attention in which token t sees tokens t-window+1 .. t; None sees all before.

    Costs O(T · window): queries in blocks of `window` tokens see their own block and the one before, masked to the
    band. Returns [B, H, T, D].
    """
    length = q_BHTD.shape[2]
    if window is None or window >= length:
        return scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
    extra = -length % window
    q, k, v = (pad(x, (0, 0, 0, extra)) for x in (q_BHTD, k_BHTD, v_BHTD))
    blocks = (length + extra) // window
    q_BHMWD, k_BHMWD, v_BHMWD = (x.unflatten(2, (blocks, window)) for x in (q, k, v))

    def with_previous(x_BHMWD: torch.Tensor) -> torch.Tensor:
        return torch.cat([pad(x_BHMWD, (0, 0, 0, 0, 1, 0))[:, :, :-1], x_BHMWD], dim=3)

    position = torch.arange(window, device=q.device)
    distance = position[:, None] + window - torch.arange(2 * window, device=q.device)
    band = (distance >= 0) & (distance < window)
    visible_MWX = band.expand(blocks, window, 2 * window).clone()
    visible_MWX[0, :, :window] = False  # nothing comes before the first block
    # One batch dimension of B·H·M blocks: the fused CPU kernel takes four dimensions only.
    mask = visible_MWX.expand(*q.shape[:2], blocks, window, 2 * window)
    output = scaled_dot_product_attention(
        q_BHMWD.flatten(0, 1),
        with_previous(k_BHMWD).flatten(0, 1),
        with_previous(v_BHMWD).flatten(0, 1),
        attn_mask=mask.flatten(0, 1),
    )
    return output.view_as(q)[:, :, :length]


class GatedAttention(nn.Module):
    """Attention whose output is gated per head and feature by a sigmoid of the input; heads split over TP ranks."""

    def __init__(self, config: DecoderConfig, backend: Backend) -> None:
        super().__init__()
        self._config = config
        share = backend.tensor_parallel_size
        self._heads = config.attention_heads // share
        self._key_value_heads = config.key_value_heads // share
        hidden, width = config.hidden_size, config.head_dim
        self.query_gate = backend.column_linear(hidden, config.attention_heads * 2 * width)
        self.key = backend.column_linear(hidden, config.key_value_heads * width)
        self.value = backend.column_linear(hidden, config.key_value_heads * width)
        self.output = backend.row_linear(config.attention_heads * width, hidden)
        self.query_norm = backend.norm(width)
        self.key_norm = backend.norm(width)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        """Map normed hidden states [B, T, hidden] to what attention adds to the residual stream."""
        config = self._config
        query_gate = self.query_gate(x_BTE).unflatten(-1, (self._heads, 2 * config.head_dim))
        q_BTHD, gate_BTHD = query_gate.chunk(2, dim=-1)
        k_BTHD = self.key(x_BTE).unflatten(-1, (self._key_value_heads, config.head_dim))
        v_BTHD = self.value(x_BTE).unflatten(-1, (self._key_value_heads, config.head_dim))
        tables = rotary_tables(x_BTE.shape[1], config.rotary_dim, config.rotary_base, x_BTE.device)
        q_BHTD = rotate(self.query_norm(q_BTHD).transpose(1, 2), *tables)
        k_BHTD = rotate(self.key_norm(k_BTHD).transpose(1, 2), *tables)
        repeats = self._heads // self._key_value_heads
        mixed_BHTD = windowed_attention(
            q_BHTD,
            k_BHTD.repeat_interleave(repeats, dim=1),
            v_BTHD.transpose(1, 2).repeat_interleave(repeats, dim=1),
            config.window,
        )
        gated = mixed_BHTD.transpose(1, 2) * torch.sigmoid(gate_BTHD)
        return self.output(gated.flatten(2))

    def num_parameters(self) -> int:
        """Slow weights on this rank."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token: 6 per weight, 12 per attended pair and width."""
        config = self._config
        seen = min(config.window or sequence_length, sequence_length)
        weights = config.hidden_size * config.head_dim * (3 * config.attention_heads + 2 * config.key_value_heads)
        return 6 * weights + 12 * config.attention_heads * config.head_dim * seen
