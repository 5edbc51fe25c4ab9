"""RoPE as a rotation of complex pairs; YaRN against transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_fwpkm.compatibility import mend_torchvision
from megatron_fwpkm.model.rotary import RotaryTables, rotary_frequencies, rotary_tables
from megatron_fwpkm.model.settings import DecoderConfig, YarnConfig
from tests.model.support import random_tokens, small_decoder


def tables(length: int, dtype: torch.dtype = torch.float32) -> RotaryTables:
    return rotary_tables(DecoderConfig(head_dim=16, rotary_fraction=0.5), torch.arange(length), dtype)


def test_rope_keeps_norms_and_depends_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 12, 1, 16)
    turned_q, turned_k = tables(12).rotate(q), tables(12).rotate(k)
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned_q[..., 8:], q[..., 8:])
    scores = turned_q[0, :, 0] @ turned_k[0, :, 0].T
    for distance in range(6):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)


def test_rope_is_the_rotation_of_complex_pairs() -> None:
    x = torch.randn(1, 9, 1, 16, dtype=torch.float64)
    # Frequencies are float32 whatever the dtype; angles are not.
    frequency = (1 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)).double()
    turn = torch.exp(1j * torch.outer(torch.arange(9).double(), frequency)).unsqueeze(1)
    pairs = torch.complex(x[..., :4], x[..., 4:8]) * turn
    expected = torch.cat([pairs.real, pairs.imag, x[..., 8:]], dim=-1)
    assert torch.allclose(tables(9, torch.float64).rotate(x), expected, atol=1e-14)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(
    ("factor", "length", "options"),
    [
        (4.0, 4096, {}),
        (32.0, 4096, {}),
        (8.0, 512, {"beta_fast": 16.0, "beta_slow": 2.0}),
        (1.0, 1024, {}),
        (16.0, 64, {"attention_factor": 1.25}),
    ],
)
def test_yarn_equals_transformers(fraction: float, factor: float, length: int, options: dict[str, float]) -> None:
    mend_torchvision()
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, **options}
    config = SimpleNamespace(
        rope_theta=10000.0,
        partial_rotary_factor=fraction,
        head_dim=64,
        hidden_size=768,
        num_attention_heads=12,
        max_position_embeddings=length,
        rope_scaling=scaling,
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    yarn = YarnConfig(factor=factor, original_length=length, **options)
    frequency, found_factor = rotary_frequencies(int(64 * fraction), 10000.0, yarn)
    assert torch.allclose(frequency, expected, rtol=1e-6, atol=0)
    assert found_factor == pytest.approx(expected_factor)
    assert frequency.dtype == torch.float32


def test_scaling_is_set_after_training() -> None:
    model, tokens = small_decoder(mixers=("full_attention",)).eval(), random_tokens(1, 24)
    before = model.logits(tokens)
    model.rope_scaling = YarnConfig(factor=4.0, original_length=8)
    assert not torch.allclose(model.logits(tokens), before)
    model.rope_scaling = None
    assert torch.equal(model.logits(tokens), before)


@pytest.mark.parametrize(
    "change", [{"factor": 0.5}, {"original_length": 0}, {"beta_fast": 1.0}, {"attention_factor": 0.0}]
)
def test_impossible_scaling(change: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        YarnConfig(**{"factor": 2.0, "original_length": 64, **change})  # type: ignore[arg-type]
