"""The decoder: initialization, order of sublayers, loss, head, and its memories."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from megatron_fwpkm.memory import PKMLayer
from megatron_fwpkm.memory.pkm_layer import named_slow_weights
from megatron_fwpkm.model.attention import GatedAttention
from megatron_fwpkm.model.decoder import Decoder, layer_seed
from megatron_fwpkm.model.delta_net import GatedDeltaNet
from megatron_fwpkm.parallel.backend import TorchBackend
from tests.model.support import MEMORY, VOCABULARY, plain_context, random_tokens, small_config, small_decoder


def test_initialization_is_by_layer_seed_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first = small_decoder()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = small_decoder(layers=2)
    weights = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert len({layer_seed(1, index) for index in range(100)}) == 100
    other = dict(small_decoder(seed=2).named_parameters())
    assert not torch.equal(other["embedding.weight"], weights["embedding.weight"])


def test_initial_values() -> None:
    config = small_config(hidden_size=64, tied_embeddings=False)
    model = Decoder(config, 512, TorchBackend(), 1)
    for name, parameter in model.named_parameters():
        if name.endswith("mixer.output_norm.weight") or name.endswith("dt_bias"):
            assert bool((parameter == 1).all()), name
        elif "norm" in name:
            assert parameter.abs().max() == 0, name
        elif not name.endswith("A_log"):
            assert math.isclose(parameter.std().item(), 0.02, rel_tol=0.15), name
    tokens = torch.randint(0, 512, (2, 16))
    assert abs(model(tokens, tokens.roll(1)).mean().item() - math.log(512)) < 0.1


def test_head_is_tied_to_the_embedding_unless_told_otherwise() -> None:
    tied, untied = small_decoder(), small_decoder(tied_embeddings=False)
    assert not list(tied.head.parameters())
    hidden = torch.randn(1, 1, 32, dtype=torch.float64)
    weight = tied.get_parameter("embedding.weight")
    assert torch.equal(tied.head(hidden, weight), hidden @ weight.T)
    head = untied.get_parameter("head.weight")
    assert head.shape == (VOCABULARY, 32) and not torch.equal(head, untied.get_parameter("embedding.weight"))
    tokens = random_tokens(1, 5)
    assert not torch.allclose(untied.logits(tokens), tied.logits(tokens))


def test_loss_is_causal() -> None:
    model = small_decoder(torch.float32, memory_layers=(1,), pkm_layers=(2,)).eval()
    tokens = random_tokens(1, 32)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % VOCABULARY
    with torch.no_grad():
        same = model.logits(tokens)[0, :20] == model.logits(changed)[0, :20]
    assert same.all()


def test_ignored_labels_have_no_loss_and_no_gradient() -> None:
    model, tokens, labels = small_decoder(), random_tokens(2, 12), random_tokens(2, 12, seed=1)
    full = model(tokens, labels)
    holed = labels.clone()
    holed[0, 3:], holed[1, ::2] = -100, -100
    loss = model(tokens, holed)
    ignored = holed == -100
    assert bool((loss[ignored] == 0).all()) and torch.equal(loss[~ignored], full[~ignored])
    loss.sum().backward()
    gradient = model.get_parameter("embedding.weight").grad
    assert gradient is not None and bool(torch.isfinite(gradient).all())
    model.zero_grad()
    nothing = model(tokens, torch.full_like(labels, -100))
    nothing.sum().backward()
    assert bool((nothing == 0).all())
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())
    assert small_decoder(torch.float32)(tokens, labels).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_is_float32(dtype: torch.dtype) -> None:
    model = small_decoder(torch.float32, memory_layers=(1,), pkm_layers=(2,)).to(dtype)
    tokens = random_tokens(2, 40)
    loss = model(tokens, tokens.roll(-1, 1))
    assert loss.dtype == torch.float32 and bool(torch.isfinite(loss).all())
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_blocks_are_what_the_configuration_says() -> None:
    model = small_decoder(layers=6, memory_layers=(0, 2), pkm_layers=(2, 5))
    assert [index for index, _ in model.memory_layers()] == [0, 2]
    mixers = [block.mixer for block in model.blocks]
    assert [type(mixer) for mixer in mixers] == [GatedDeltaNet, GatedAttention, GatedAttention] * 2
    assert [mixer.sliding for mixer in mixers if isinstance(mixer, GatedAttention)] == [True, False] * 2
    assert [index for index, block in enumerate(model.blocks) if isinstance(block.mlp, PKMLayer)] == [2, 5]
    block = model.blocks[0]
    seen: list[str] = []
    for name in ("memory", "mixer_norm", "mixer", "mlp_norm", "mlp"):
        getattr(block, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    h = torch.randn(2, 16, 32, dtype=torch.float64)
    block(h, plain_context(model.config, h))
    assert seen == ["memory", "mixer_norm", "mixer", "mlp_norm", "mlp"]


def test_memories_differ_by_layer_and_are_no_parameters() -> None:
    model = small_decoder(memory_layers=(0, 2))
    slots = MEMORY.n_subkeys**2
    assert not any(slots in tensor.shape for tensor in model.state_dict().values() if tensor is not None)
    projections = [dict(layer.named_parameters()) for _, layer in model.memory_layers()]
    name = next(name for name, parameter in projections[0].items() if parameter.dim() == 2)
    assert not torch.equal(projections[0][name], projections[1][name])


def test_gradients_reach_every_slow_weight() -> None:
    model = small_decoder(memory_layers=(1,), pkm_layers=(0,), tied_embeddings=False)
    tokens = random_tokens(2, 32)
    for _, state in model.fast_states():
        state.begin_step()
    model(tokens, tokens.roll(-1, 1)).mean().backward()
    without = [name for name, p in named_slow_weights(model) if p.grad is None or not bool(p.grad.to_dense().any())]
    assert without == []


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"key_value_heads": 3},
        {"window": 0},
        {"rotary_fraction": 0.2},
        {"rotary_fraction": 2.0},
        {"mixers": ()},
        {"mixers": ("attention",)},
        {"memory_layers": (3,)},
        {"pkm_layers": (1, 1)},
    ],
)
def test_impossible_sizes(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        small_config(**change)


def test_sublayers_computed_again_change_nothing_and_memories_write_once() -> None:
    """Mixers and MLPs run twice, memories and PKM layers once; gradients and fast state are bitwise the same."""

    def count(name: str, calls: dict[str, int], *hook: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    tokens, found = random_tokens(2, 24), []
    for recompute in (False, True):
        model = small_decoder(memory_layers=(0, 1), pkm_layers=(2,))
        model.recompute_sublayers(recompute)
        calls: dict[str, int] = {}
        for name, module in model.named_modules():
            if name.split(".")[-1] in ("mixer", "mlp", "memory"):
                module.register_forward_pre_hook(partial(count, name, calls))
        model(tokens, tokens.roll(-1, 1)).mean().backward()
        again = 2 if recompute else 1
        assert all(calls[f"blocks.{index}.mixer"] == again for index in range(3))
        assert calls["blocks.0.mlp"] == calls["blocks.1.mlp"] == again and calls["blocks.2.mlp"] == 1
        assert calls["blocks.0.memory"] == calls["blocks.1.memory"] == 1
        gradients = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
        states = [tensor for _, state in model.fast_states() for tensor in (state.keys_H2nd, state.values_ND())]
        found.append([*gradients, *states])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
