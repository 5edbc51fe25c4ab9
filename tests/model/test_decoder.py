"""The decoder: initialization, order of sublayers, costs, and its memories."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.model.decoder import Decoder, layer_seed
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import TorchBackend

MEMORY = MemoryConfig(heads=1, topk=4, n_subkeys=16, k_dim=16, v_dim=16, chunk_size=8)


def _config(memory_layers: tuple[int, ...] = (), **changes: object) -> DecoderConfig:
    sizes: dict[str, object] = {
        "hidden_size": 32,
        "layers": 3,
        "attention_heads": 4,
        "key_value_heads": 2,
        "head_dim": 8,
        "mlp_size": 48,
        "window": 8,
    }
    return DecoderConfig(**{**sizes, **changes}, memory=MEMORY, memory_layers=memory_layers)  # type: ignore[arg-type]


def _decoder(config: DecoderConfig, seed: int = 1) -> Decoder:
    return Decoder(config, 128, TorchBackend(), seed)


def test_initialization_is_by_layer_seed_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first = _decoder(_config())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = _decoder(_config(layers=2))
    weights = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert len({layer_seed(1, index) for index in range(100)}) == 100
    assert not torch.equal(
        dict(_decoder(_config(), seed=2).named_parameters())["embedding.weight"], weights["embedding.weight"]
    )


def test_initial_values() -> None:
    model = Decoder(_config(hidden_size=64), 512, TorchBackend(), 1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.abs().max() == 0, name
        else:
            assert math.isclose(parameter.std().item(), 0.02, rel_tol=0.1), name
    tokens = torch.randint(0, 512, (2, 16))
    assert abs(model(tokens, tokens.roll(1)).mean().item() - math.log(512)) < 0.1


def test_head_is_tied_to_the_embedding() -> None:
    model = _decoder(_config())
    assert not list(model.head.parameters())
    hidden = torch.randn(1, 1, 32)
    weight = model.get_parameter("embedding.weight")
    assert torch.equal(model.head(hidden, weight), hidden @ weight.T)


def test_loss_is_causal() -> None:
    model = _decoder(_config(memory_layers=(1,))).eval()
    tokens = torch.randint(0, 128, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 128
    with torch.no_grad():
        same = model.logits(tokens)[0, :20] == model.logits(changed)[0, :20]
    assert same.all()


def test_num_parameters_and_flops() -> None:
    config = _config()
    model = _decoder(config)
    attention = 32 * 8 * (4 * 2 + 2 + 2 + 4)
    assert model.num_parameters() == 128 * 32 + 3 * (attention + 3 * 32 * 48 + 2 * 8 + 2 * 32) + 32
    per_block = 6 * (attention + 3 * 32 * 48) + 12 * 32 * 8
    assert model.num_flops_per_token(64) == 6 * 128 * 32 + 3 * per_block


def test_memory_is_an_extra_sublayer_before_attention() -> None:
    model = _decoder(_config(memory_layers=(0, 2)))
    assert [index for index, _ in model.memory_layers()] == [0, 2]
    block = model.blocks[0]
    seen: list[str] = []
    for name in ("memory", "attention_norm", "attention", "mlp_norm", "mlp"):
        getattr(block, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    h = torch.randn(2, 16, 32)
    block(h)
    assert seen == ["memory", "attention_norm", "attention", "mlp_norm", "mlp"]


def test_memories_differ_by_layer_and_are_no_parameters() -> None:
    model = _decoder(_config(memory_layers=(0, 2)))
    plain = _decoder(_config())
    added = sum(layer.num_parameters()["slow"] for _, layer in model.memory_layers())
    assert model.num_parameters() == plain.num_parameters() + added
    slots = MEMORY.n_subkeys**2
    assert not any(slots in tensor.shape for tensor in model.state_dict().values() if tensor is not None)
    projections = [dict(layer.named_parameters()) for _, layer in model.memory_layers()]
    name = next(name for name, parameter in projections[0].items() if parameter.dim() == 2)
    assert not torch.equal(projections[0][name], projections[1][name])


def test_gradients_reach_every_slow_weight() -> None:
    model = _decoder(_config(memory_layers=(1,)))
    tokens = torch.randint(0, 128, (2, 32))
    for _, state in model.fast_states():
        state.begin_step()
    model(tokens, tokens.roll(-1, 1)).mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize(
    "change",
    [{"layers": 0}, {"key_value_heads": 3}, {"window": 0}, {"rotary_fraction": 0.2}, {"rotary_fraction": 2.0}],
)
def test_impossible_sizes(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        _config(**change)  # type: ignore[arg-type]
