"""Which parameters are decayed, by their names and by those of the paper's code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from megatron_fwpkm.memory import FwPKMLayer, MemoryConfig, PKMConfig, PKMLayer, RMSNorm
from megatron_fwpkm.memory.pkm_layer import slow_tables
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.train.engine import check_fast_state
from megatron_fwpkm.train.optimizer import build_optimizer, is_decayed, parameter_groups, set_learning_rate

GOLDEN_MODELS = Path(__file__).parents[1] / "golden_model"

# (our name, name in the paper's code, decayed): every kind of parameter of every kind of module.
NAMES = [
    ("embedding.weight", "model.embed_tokens.weight", True),
    ("norm.weight", "model.norm.weight", False),
    ("blocks.0.attention_norm.weight", "model.layers.0.input_layernorm.weight", False),
    ("blocks.0.mlp_norm.weight", "model.layers.0.post_attention_layernorm.weight", False),
    ("blocks.0.attention.query_gate.weight", "model.layers.0.self_attn.q_proj.weight", True),
    ("blocks.0.attention.key.weight", "model.layers.0.self_attn.k_proj.weight", True),
    ("blocks.0.attention.value.weight", "model.layers.0.self_attn.v_proj.weight", True),
    ("blocks.0.attention.output.weight", "model.layers.0.self_attn.o_proj.weight", True),
    ("blocks.0.attention.query_norm.weight", "model.layers.0.self_attn.q_norm.weight", False),
    ("blocks.0.attention.key_norm.weight", "model.layers.0.self_attn.k_norm.weight", False),
    ("blocks.1.delta_net.A_log", "model.layers.1.linear_attn.A_log", True),
    ("blocks.1.delta_net.dt_bias", "model.layers.1.linear_attn.dt_bias", False),
    ("blocks.1.delta_net.conv.weight", "model.layers.1.linear_attn.conv1d.weight", True),
    ("blocks.1.delta_net.output_norm.weight", "model.layers.1.linear_attn.norm.weight", False),
    ("blocks.1.delta_net.output.weight", "model.layers.1.linear_attn.out_proj.weight", True),
    ("blocks.0.mlp.gate.weight", "model.layers.0.mlp.gate_proj.weight", True),
    ("blocks.0.mlp.up.weight", "model.layers.0.mlp.up_proj.weight", True),
    ("blocks.0.mlp.down.weight", "model.layers.0.mlp.down_proj.weight", True),
    ("blocks.2.mlp.keys", "model.layers.2.pkm.keys", True),
    ("blocks.2.mlp.values", "model.layers.2.pkm.values.weight", True),
    ("blocks.2.mlp.query_projection.weight", "model.layers.2.pkm.query_proj.query_mlps.0.weight", True),
    ("blocks.2.mlp.query_projection.bias", "model.layers.2.pkm.query_proj.query_mlps.0.bias", False),
    ("blocks.2.mlp.query_norm.weight", "model.layers.2.pkm.query_proj.norm.weight", False),
    ("blocks.2.mlp.gate_projection.weight", "model.layers.2.pkm.swilu_projection.weight", True),
    ("blocks.2.mlp.output_projection.weight", "model.layers.2.pkm.value_proj.weight", True),
    ("blocks.3.memory.query_projection.weight", "model.layers.3.fw_q_proj.weight", True),
    ("blocks.3.memory.query_projection.bias", "model.layers.3.fw_q_proj.bias", False),
    ("blocks.3.memory.value_projection.weight", "model.layers.3.fw_v_proj.weight", True),
    ("blocks.3.memory.gate_projection.weight", "model.layers.3.fw_out_gate.weight", True),
    ("blocks.3.memory.output_projection.weight", "model.layers.3.fw_out_proj.weight", True),
    ("blocks.3.memory.query_norm.weight", "model.layers.3.fw_q_norm.weight", False),
    ("blocks.3.memory.output_norm.weight", "model.layers.3.fw_out_norm.weight", False),
    ("blocks.1.delta_net.qkvz.weight", "model.layers.1.linear_attn.in_proj_qkvz.weight", True),
    ("blocks.1.delta_net.ba.weight", "model.layers.1.linear_attn.in_proj_ba.weight", True),
    ("blocks.2.mlp.gate_projection.bias", "model.layers.2.pkm.swilu_projection.bias", False),
    ("blocks.2.mlp.output_projection.bias", "model.layers.2.pkm.value_proj.bias", False),
    ("blocks.3.memory.value_projection.bias", "model.layers.3.fw_v_proj.bias", False),
    ("blocks.3.memory.value_norm.weight", "model.layers.3.fw_v_norm.weight", False),
    ("blocks.3.memory.gate_projection.bias", "model.layers.3.fw_out_gate.bias", False),
    ("blocks.3.memory.gate_norm.weight", "model.layers.3.fw_out_gate_norm.weight", False),
    ("blocks.3.memory.output_projection.bias", "model.layers.3.fw_out_proj.bias", False),
    ("head.weight", "lm_head.weight", True),
]


@pytest.mark.parametrize(("ours", "official", "decayed"), NAMES)
def test_the_rule_gives_the_same_for_our_name_and_the_official_one(ours: str, official: str, decayed: bool) -> None:
    assert is_decayed(ours) is decayed
    assert is_decayed(official) is decayed


def test_the_names_are_all_names_of_the_official_models() -> None:
    """Every kind of parameter that the golden models' files have is in the list above, and nothing else."""
    found = set()
    for path in GOLDEN_MODELS.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {_kind(name) for name in file.keys() if ".fwpkm." not in name}  # noqa: SIM118 - not a dict
    assert {_kind(official) for _, official, _ in NAMES} == found


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name)


def test_every_parameter_of_real_modules_falls_where_its_kind_belongs() -> None:
    """Biases and norms by what the module is, not by its name; everything else is decayed."""
    memory = MemoryConfig(heads=1, topk=2, n_subkeys=4, k_dim=8, v_dim=8, chunk_size=4)
    config = DecoderConfig(
        hidden_size=16,
        layers=2,
        attention_heads=2,
        key_value_heads=1,
        head_dim=8,
        mlp_size=8,
        memory_layers=(1,),
        memory=memory,
    )
    pkm = PKMLayer(16, PKMConfig(heads=1, topk=2, n_subkeys=4, k_dim=8, v_dim=8))
    model = nn.ModuleList([Decoder(config, 32, TorchBackend(), seed=1), FwPKMLayer(16, memory), pkm])
    assert is_decayed("2.values") and list(slow_tables(model)) == ["2.values"]
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            spared = name == "bias" or isinstance(module, RMSNorm)
            assert is_decayed(f"{path}.{name}") is not spared, f"{path}.{name}"
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    grouped = [id(parameter) for group in (decayed, kept) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert group["params"] == [model.bias] and torch.equal(model.bias, group["params"][0])


@pytest.mark.parametrize("damage", ["narrow", "trained"])
def test_fast_state_that_the_engine_could_touch_is_an_error(damage: str) -> None:
    layer = FwPKMLayer(16, MemoryConfig(heads=1, topk=2, n_subkeys=4, k_dim=8, v_dim=8, chunk_size=4))
    model = nn.Sequential(layer).to(torch.bfloat16)
    check_fast_state(model)
    if damage == "narrow":
        layer.fast_state.table_ND = layer.fast_state.table_ND.bfloat16()
    else:
        layer.register_buffer("table", layer.fast_state.table_ND)
    with pytest.raises(RuntimeError, match="the fast state of 0"):
        check_fast_state(model)
