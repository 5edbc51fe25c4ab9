"""What modules say of their weights and operations, against the weights themselves and torch's own count."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_fwpkm.accounting import ParameterCount, total
from megatron_fwpkm.config import load_model_config
from megatron_fwpkm.memory import PKMLayer
from megatron_fwpkm.memory.pkm_layer import named_slow_weights
from megatron_fwpkm.model.attention import GatedAttention
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.delta_net import GatedDeltaNet
from megatron_fwpkm.model.settings import DecoderConfig, DeltaNetConfig
from megatron_fwpkm.parallel.backend import TorchBackend
from tests.model.support import VOCABULARY, random_tokens, small_decoder

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
LENGTH = 32
CHANGES: list[dict] = [
    {"mixers": ("full_attention",)},
    {"mixers": ("sliding_attention",), "key_value_heads": 1},
    {"mixers": ("gated_delta_net",)},
    {"tied_embeddings": False},
    {"memory_layers": (0, 2), "pkm_layers": (1,), "tied_embeddings": False},
]


def real_count(model: Decoder) -> tuple[int, int]:
    fast = sum(t.numel() for _, state in model.fast_states() for t in (state.keys_H2nd, state.table_ND))
    return sum(weight.numel() for _, weight in named_slow_weights(model)), fast


@pytest.mark.parametrize("changes", CHANGES)
def test_parameters_are_those_there_are(changes: dict) -> None:
    model = small_decoder(**changes)
    count = model.num_parameters()
    assert (count.slow, count.fast) == real_count(model)
    idle = sum(
        block.mlp.values.numel() - 2 * 4 * 12 for block in model.blocks if isinstance(block.mlp, PKMLayer)
    )  # 2 heads read 4 rows of 12 columns
    idle_fast = sum(state.table_ND.numel() - 4 * 16 for _, state in model.fast_states())
    idle_embedding = 0 if model.config.tied_embeddings else (VOCABULARY - 1) * 32
    assert count.active_per_token == count.slow + count.fast - idle - idle_fast - idle_embedding


def test_counts_add_up() -> None:
    assert ParameterCount(1, 2, 3) + ParameterCount(10, 20, 30) == ParameterCount(11, 22, 33)
    assert total([]) == ParameterCount(0, 0, 0)


def counted_flops(model: Decoder) -> float:
    """What torch counts per token of a forward and backward pass: products of matrices."""
    tokens = random_tokens(2, LENGTH)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).sum().backward()
    return counter.get_total_flops() / tokens.numel()


def seen_beyond_need(config: DecoderConfig, layer: GatedAttention) -> float:
    """Operations on pairs that attention computes and masks: all of them, or two blocks of a window."""
    computed = LENGTH if layer.window is None else 2 * layer.window
    per_pair = 12 * config.attention_heads * config.head_dim
    needed = layer.num_flops_per_token(LENGTH) - layer.num_flops_per_token(1) + per_pair
    return per_pair * computed - needed


@pytest.mark.parametrize("changes", CHANGES[:4], ids=["full", "sliding", "delta_net", "all_untied"])
def test_flops_are_what_torch_counts(changes: dict) -> None:
    model = small_decoder(**changes)
    expected = float(model.num_flops_per_token(LENGTH))
    for block in model.blocks:
        if isinstance(block.mixer, GatedAttention):
            expected += seen_beyond_need(model.config, block.mixer)
        if isinstance(block.mixer, GatedDeltaNet):  # shifted products, no product of matrices
            expected -= 6 * block.mixer.convolution.numel()
    assert counted_flops(model) == pytest.approx(expected, rel=1e-6)


def test_flops_of_memories_hold_at_least_their_products_of_matrices() -> None:
    """torch sees projections and the scoring of sub-keys, not what is done on gathered rows."""
    plain, full = (
        small_decoder(torch.float32, layers=2, mixers=("full_attention",), **changes)
        for changes in ({"pkm_layers": ()}, {"memory_layers": (0,), "pkm_layers": (1,)})
    )
    told = full.num_flops_per_token(LENGTH) - plain.num_flops_per_token(LENGTH)
    counted = counted_flops(full) - counted_flops(plain)
    memory, pkm = full.blocks[0].memory, full.blocks[1].mlp
    assert memory is not None
    on_rows = 2 * 4 * 16 * 6 + 2 * 4 * 16 * 5 + 2 * 8 * 12 * 3 + 2 * 4 * 32 * 2
    assert isinstance(pkm, PKMLayer)
    assert counted == pytest.approx(told - on_rows, rel=0.02)


def test_cost_per_token_of_a_memory_grows_with_sub_keys_not_slots() -> None:
    small, large = (
        small_decoder(memory_layers=(0,), memory=dataclasses.replace(small_decoder().config.memory, n_subkeys=n))
        for n in (16, 32)
    )
    assert large.num_flops_per_token(LENGTH) - small.num_flops_per_token(LENGTH) == 2 * 16 * 16


def expected_slow(config: DecoderConfig, vocab_size: int) -> int:
    """The paper's models by hand."""
    hidden, count = config.hidden_size, vocab_size * config.hidden_size + config.hidden_size
    if not config.tied_embeddings:
        count += vocab_size * hidden
    for index in range(config.layers):
        count += 2 * hidden
        if config.mixer(index) == "gated_delta_net":
            sizes = config.delta_net
            keys, values = sizes.key_heads * sizes.key_head_dim, sizes.value_heads * sizes.value_head_dim
            count += hidden * (2 * keys + 2 * values + 2 * sizes.value_heads) + values * hidden
            count += (2 * keys + values) * sizes.conv_kernel + 2 * sizes.value_heads + sizes.value_head_dim
        else:
            width = config.head_dim
            count += hidden * width * (3 * config.attention_heads + 2 * config.key_value_heads) + 2 * width
        if index in config.memory_layers:
            memory = config.memory
            queries = memory.heads * memory.k_dim
            count += 3 * hidden + memory.v_dim + (hidden + 1) * (queries + memory.v_dim + 8)
            count += (memory.v_dim + 1) * hidden
        if index in config.pkm_layers:
            pkm = config.pkm
            queries = pkm.heads * pkm.k_dim
            count += (hidden + 1) * (queries + pkm.v_dim) + queries + (pkm.v_dim + 1) * hidden
            count += pkm.n_subkeys * queries + pkm.n_subkeys**2 * pkm.v_dim
        else:
            count += 3 * hidden * config.mlp_size
    return count


@pytest.mark.parametrize("path", PRESETS, ids=[path.stem for path in PRESETS])
def test_presets(path: Path) -> None:
    """Every preset loads, and says of itself what its sizes say; a tiny variant of it trains."""
    config = load_model_config(path)
    with torch.device("meta"):
        model = Decoder(config, 32000, TorchBackend(), seed=1)
    count, memories = model.num_parameters(), len(config.memory_layers)
    assert count.slow == expected_slow(config, 32000)
    memory = config.memory
    assert count.fast == memories * memory.n_subkeys * (memory.heads * memory.k_dim + memory.n_subkeys * memory.v_dim)
    assert 0 < count.active_per_token <= count.slow + count.fast
    tiny = dataclasses.replace(
        config,
        hidden_size=16,
        attention_heads=4,
        key_value_heads=2,
        head_dim=8,
        mlp_size=24,
        window=8,
        delta_net=DeltaNetConfig(2, 2, 8, 8),
        memory=dataclasses.replace(memory, n_subkeys=8, k_dim=8, v_dim=8, chunk_size=8),
        pkm=dataclasses.replace(config.pkm, topk=4, n_subkeys=8, k_dim=8, v_dim=8),
    )
    small = Decoder(tiny, VOCABULARY, TorchBackend(), seed=1)
    assert (small.num_parameters().slow, small.num_parameters().fast) == real_count(small)
    assert small.num_parameters().slow == expected_slow(tiny, VOCABULARY)
    tokens = random_tokens(1, 12)
    small(tokens, tokens).mean().backward()


def test_the_papers_presets_are_all_there() -> None:
    names = {path.stem for path in PRESETS}
    memories = ("plain", "fwpkm2_6_10", "pkm2_6_10", "pkm6_fwpkm2_10")
    wanted = {f"paper-12l-{mixers}-{memory}" for mixers in ("gdn", "fa", "swa", "gdn-fa") for memory in memories}
    assert wanted <= names
    config = load_model_config(PRESETS[0].parent / "paper-12l-swa-pkm6_fwpkm2_10.yaml")
    assert [index for index in range(12) if config.mixer(index) == "sliding_attention"] == [3, 7, 11]
    assert (config.window, config.memory_layers, config.pkm_layers) == (512, (2, 10), (6,))


def test_nano_plain_is_nano_without_memory() -> None:
    nano, plain = (load_model_config(PRESETS[0].parent / f"{name}.yaml") for name in ("nano", "nano-plain"))
    assert plain == dataclasses.replace(nano, memory_layers=())
