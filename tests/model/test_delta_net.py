"""The gated delta net: its convolution, its order of weights, padding."""

from __future__ import annotations

import pytest
import torch

from megatron_fwpkm.model.context import make_context
from megatron_fwpkm.model.delta_net import GatedDeltaNet, causal_convolution
from megatron_fwpkm.model.settings import DeltaNetConfig
from megatron_fwpkm.parallel.backend import TorchBackend
from tests.model.support import plain_context, small_config


@pytest.mark.parametrize("lags", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_convolution_is_torchs(lags: int, length: int) -> None:
    x = torch.randn(2, length, 5, dtype=torch.float64)
    kernel, past = torch.randn(5, lags, dtype=torch.float64), torch.randn(2, lags - 1, 5, dtype=torch.float64)
    for before in (None, past):
        padded = torch.cat([torch.zeros_like(past) if before is None else before, x], 1).transpose(1, 2)
        expected = torch.nn.functional.conv1d(padded, kernel.unsqueeze(1), groups=5).transpose(1, 2)
        assert torch.allclose(causal_convolution(x, kernel, before, None), expected, atol=1e-12)


def test_it_is_causal_and_reads_all_that_came_before() -> None:
    config = small_config()
    layer = GatedDeltaNet(config, TorchBackend(initial_std=0.5)).double()
    torch.nn.init.constant_(layer.A_log, -3.0)  # it decays slowly enough to see the end
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    changed = x.clone()
    changed[0, 9] += 1.0
    context = plain_context(config, x)
    difference = (layer(x, context) - layer(changed, context)).abs().amax(dim=-1)[0]
    assert difference.nonzero().flatten().tolist() == list(range(9, 30))


def test_padded_rows_equal_rows_alone() -> None:
    config = small_config()
    layer = GatedDeltaNet(config, TorchBackend(initial_std=0.5)).double()
    x, mask = torch.randn(2, 12, 32, dtype=torch.float64), torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    padded = layer(x, make_context(config, tokens, x.dtype, mask_BT=mask))
    alone = layer(x[1:, 5:], plain_context(config, x[1:, 5:]))
    assert torch.allclose(padded[1:, 5:], alone, atol=1e-12)


def test_initial_values() -> None:
    config = small_config(delta_net=DeltaNetConfig(16, 64, 8, 8))
    layer = GatedDeltaNet(config, TorchBackend())
    norm = layer.output_norm.get_parameter("weight")
    assert torch.equal(layer.dt_bias, torch.ones(64)) and torch.equal(norm, torch.ones(8))
    rate = layer.A_log.detach().exp()
    assert 0 < float(rate.min()) < 2 and 14 < float(rate.max()) <= 16
    for weight in (layer.convolution, layer.in_qkvz.get_parameter("weight")):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_float32_uses_the_library_and_agrees_with_float64() -> None:
    config = small_config()
    layer = GatedDeltaNet(config, TorchBackend(initial_std=0.3))
    x = torch.randn(2, 70, 32)
    found = layer(x, plain_context(config, x))
    expected = layer.double()(x.double(), plain_context(config, x.double()))
    assert float((found - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-5
