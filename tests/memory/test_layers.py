"""The FwPKM and PKM layers: gradients, caches, masks, sparse gradients, accounting."""

import dataclasses

import pytest
import torch
from torch import nn

from megatron_fwpkm.memory import FwPKMLayer, MemoryConfig, PKMConfig, PKMLayer
from megatron_fwpkm.memory.fwpkm_layer import zscore
from megatron_fwpkm.memory.pkm_layer import QUERY_NORM_EPSILON, named_slow_weights, slow_tables

CONFIG = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4, heads=2)
PKM = PKMConfig(heads=2, topk=3, n_subkeys=6, k_dim=8, v_dim=5)


def test_gradients_are_central_differences() -> None:
    torch.manual_seed(0)
    layer = FwPKMLayer(6, dataclasses.replace(CONFIG, reset="per_sequence"), dtype=torch.float64).double()
    hidden = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 11, 6, dtype=torch.float64)
    parameters = [hidden, *layer.parameters()]
    gradients = torch.autograd.grad((layer(hidden) * cotangent).sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(float((layer(hidden) * cotangent).sum()))
                parameter.sub_(direction, alpha=step)
        numeric = (values[0] - values[1]) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=2e-6, abs=1e-7)


def test_cached_stream_equals_one_call() -> None:
    layer = FwPKMLayer(6, dataclasses.replace(CONFIG, reset="per_sequence"), dtype=torch.float64).double().eval()
    hidden = torch.randn(3, 21, 6, dtype=torch.float64)
    mask = torch.rand(3, 21) > 0.3
    cache = layer.make_cache(3)
    with torch.no_grad():
        whole = layer(hidden, mask)
        parts = [layer(hidden[:, a:b], mask[:, a:b], cache) for a, b in ((0, 1), (1, 9), (9, 10), (10, 21))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)


def test_reads_switched_off_pass_the_own_value_only() -> None:
    layer = FwPKMLayer(6, CONFIG).eval()
    hidden = torch.randn(2, 9, 6)
    with_reads = layer(hidden)
    layer.memory_reads = False
    without = layer(hidden)
    assert not torch.allclose(with_reads, without)
    _, value, gate = layer._project(hidden)
    expected = layer.output_projection(layer.output_norm((1 - gate.unsqueeze(-1)) * value))
    torch.testing.assert_close(without, expected)


def test_zscore_of_a_constant_row_has_finite_gradients() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    zscore(x).sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    y = torch.randn(3, 7, dtype=torch.float64)
    expected = (y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(zscore(y), expected)


def dense_pkm(layer: PKMLayer, x: torch.Tensor) -> torch.Tensor:
    """The PKM layer with every slot scored: softmax over the K best of n * n, head by head."""
    c = layer.config
    raw = layer.query_projection(x)
    query = raw * torch.rsqrt(raw.square().mean(-1, keepdim=True) + QUERY_NORM_EPSILON) * layer.query_norm.weight
    read = x.new_zeros(*x.shape[:2], c.v_dim)
    for head, part in enumerate(query.split(c.k_dim, -1)):
        first, second = part.chunk(2, -1)
        scores = (first @ layer.keys[head, 0].T).unsqueeze(-1) + (second @ layer.keys[head, 1].T).unsqueeze(-2)
        best, slots = scores.flatten(-2).topk(c.topk, -1)
        read = read + (best.softmax(-1).unsqueeze(-1) * layer.values[slots]).sum(-2)
    return layer.output_projection(read * torch.nn.functional.silu(layer.gate_projection(x)))


@pytest.mark.parametrize("sparse", [True, False])
def test_pkm_equals_dense_scoring(sparse: bool) -> None:
    layer = PKMLayer(6, dataclasses.replace(PKM, sparse_gradients=sparse)).double()
    torch.nn.init.normal_(layer.query_norm.weight)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 4, 6, dtype=torch.float64)
    found, wanted = layer(x), dense_pkm(layer, x)
    torch.testing.assert_close(found, wanted)
    weights = dict(named_slow_weights(layer))
    leaves = [x, *weights.values()]
    expected = torch.autograd.grad((wanted * cotangent).sum(), leaves)
    (found * cotangent).sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.to_dense(), gradient, rtol=1e-9, atol=1e-11)
    assert layer.values.grad is not None and layer.values.grad.is_sparse == sparse
    if sparse:
        touched = layer.values.grad.coalesce().indices()[0]
        dense = expected[list(weights).index("values") + 1]
        assert touched.numel() < layer.values.shape[0]
        assert torch.equal(touched, dense.abs().sum(1).nonzero().view(-1))


def test_pkm_gradients_accumulate() -> None:
    layer = PKMLayer(6, PKM)
    x = torch.randn(2, 4, 6)
    layer(x).sum().backward()
    assert layer.values.grad is not None
    once = layer.values.grad.to_dense().clone()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.values.grad.to_dense(), 2 * once)


def test_pkm_values_are_no_parameter_and_follow_the_module() -> None:
    layer = PKMLayer(6, PKM)
    values, drawn = layer.values, layer.values.detach().clone()
    layer(torch.randn(2, 4, 6)).sum().backward()
    names = {name for name, _ in layer.named_parameters()} | {name for name, _ in layer.named_buffers()}
    assert "values" not in names | set(layer.state_dict()) and [*dict(named_slow_weights(layer))][-1] == "values"
    nn.Sequential(layer).to(torch.bfloat16)
    assert layer.values is values and torch.equal(values, drawn.bfloat16())
    assert values.requires_grad and values.is_leaf
    assert values.grad is not None and values.grad.is_sparse and values.grad.dtype == torch.bfloat16
    layer(torch.randn(2, 4, 6, dtype=torch.bfloat16)).sum().backward()  # adds to it
    assert list(slow_tables(nn.Sequential(layer))) == ["0.values"]
    for parameter in layer.parameters():
        parameter.data = parameter.data.double()
    layer.match_values()
    assert layer.values is values and values.dtype == torch.float64


def test_pkm_takes_whole_values_from_a_state_dict() -> None:
    layer, other = nn.Sequential(PKMLayer(6, PKM)), nn.Sequential(PKMLayer(6, PKM))
    weights = {name: weight.detach() for name, weight in named_slow_weights(other)}
    layer.load_state_dict(weights)
    loaded = dict(named_slow_weights(layer))
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.values: the whole table has shape \(4, 5\), not \(36, 5\)"):
        layer.load_state_dict(weights | {"0.values": torch.zeros(4, 5)})


def test_accounting() -> None:
    layer = FwPKMLayer(6, CONFIG)
    numbers = layer.num_parameters()
    assert numbers.slow == sum(p.numel() for p in layer.parameters())
    assert numbers.fast == 64 * 5 + 2 * 2 * 8 * 4
    assert numbers.active_per_token == numbers.slow + 2 * 2 * 8 * 4 + 6 * 5
    wider = FwPKMLayer(6, dataclasses.replace(CONFIG, n_subkeys=16))
    assert wider.num_flops_per_token() - layer.num_flops_per_token() == 2 * 8 * 2 * 8  # scoring only
    pkm = PKMLayer(6, PKM)
    assert pkm.num_parameters().slow - pkm.num_parameters().active_per_token == (36 - 6) * 5


def test_autocast_does_not_reach_the_memory() -> None:
    layer = FwPKMLayer(6, dataclasses.replace(CONFIG, reset="per_sequence"))
    hidden = torch.randn(2, 9, 6)
    query, value, gate = layer._project(hidden)
    plain = layer._call_memory(query, value, gate, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._call_memory(query, value, gate, None), plain)
