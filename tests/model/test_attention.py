"""Windowed attention against a full masked softmax; RoPE."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fwpkm.model.attention import GatedAttention, rotary_tables, rotate, windowed_attention
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import TorchBackend


def reference_attention(
    q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Softmax over all pairs with everything outside the band masked."""
    length = q_BHTD.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    scores = q_BHTD @ k_BHTD.transpose(-1, -2) / math.sqrt(q_BHTD.shape[-1])
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v_BHTD


@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 16, 21, 40])
@pytest.mark.parametrize("length", [1, 7, 16, 21])
def test_windowed_attention_equals_reference(window: int | None, length: int) -> None:
    q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = reference_attention(q, k, v, window)
    found = windowed_attention(q, k, v, window)
    assert torch.allclose(found, expected, atol=1e-12)
    direction = torch.randn_like(expected)
    gradients, others = (torch.autograd.grad(output, (q, k, v), direction) for output in (found, expected))
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_rope_keeps_norms_and_depends_on_distance_alone() -> None:
    cosine, sine = rotary_tables(12, 8, 10000.0, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 12, 16)
    turned_q, turned_k = rotate(q, cosine, sine), rotate(k, cosine, sine)
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned_q[..., 8:], q[..., 8:])
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]
    for distance in range(6):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)


def test_rope_is_the_rotation_of_complex_pairs() -> None:
    x = torch.randn(1, 1, 9, 8)
    frequency = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * torch.outer(torch.arange(9), frequency))
    found = rotate(x, *rotary_tables(9, 8, 10000.0, torch.device("cpu")))
    assert torch.allclose(found, torch.cat([pairs.real, pairs.imag], dim=-1), atol=1e-6)


def test_attention_is_causal_and_local() -> None:
    config = DecoderConfig(hidden_size=32, attention_heads=4, key_value_heads=2, head_dim=8, window=4)
    layer = GatedAttention(config, TorchBackend(initial_std=0.5))
    x = torch.randn(1, 20, 32)
    changed = x.clone()
    changed[0, 9] += 1.0
    difference = (layer(x) - layer(changed)).abs().amax(dim=-1)[0]
    assert difference.nonzero().flatten().tolist() == [9, 10, 11, 12]


def test_costs() -> None:
    config = DecoderConfig(hidden_size=32, attention_heads=4, key_value_heads=2, head_dim=8, window=4)
    layer = GatedAttention(config, TorchBackend())
    weights = 32 * 8 * (4 * 2 + 2 + 2 + 4)
    assert layer.num_parameters() == weights + 2 * 8
    assert layer.num_flops_per_token(100) == 6 * weights + 12 * 32 * 4
