"""Whole models of the paper's code: weights, configurations and replay, as `launch/verify.py` does it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_fwpkm.convert.golden import is_model_case, replay_model_case
from megatron_fwpkm.convert.official_config import OfficialConfigError, decoder_config
from megatron_fwpkm.convert.official_names import OfficialWeightsError, load_official, official_weights
from megatron_fwpkm.memory.golden import GoldenCaseError
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import YarnConfig
from megatron_fwpkm.parallel.backend import TorchBackend
from tests.commands import run_command

ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT / "tests" / "golden_model").glob("*.json"))


def official(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["config"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_cases(path: Path, dtype: torch.dtype) -> None:
    result = replay_model_case(path, dtype)
    assert [array for array in result.arrays if not array.passed] == []
    assert len(result.arrays) >= (3 if "cache" in path.stem else 100)


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_weights_there_and_back(path: Path) -> None:
    weights = load_file(path.with_suffix(".safetensors"))
    config, vocab_size = decoder_config(official(path))
    model = Decoder(config, vocab_size, TorchBackend(), seed=0)
    load_official(model, weights)
    found = official_weights(model)
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[name]), name


def test_wrong_weights_are_refused_before_anything_changes() -> None:
    weights = load_file(CASES[0].with_suffix(".safetensors"))
    config, vocab_size = decoder_config(official(CASES[0]))
    model = Decoder(config, vocab_size, TorchBackend(), seed=0)
    before = official_weights(model)["model.norm.weight"].clone()
    missing = {name: tensor for name, tensor in weights.items() if name != "model.layers.2.fwpkm.keys"}
    with pytest.raises(OfficialWeightsError, match=r"missing model\.layers\.2\.fwpkm\.keys, unknown none"):
        load_official(model, missing)
    with pytest.raises(OfficialWeightsError, match=r"unknown model\.extra"):
        load_official(model, {**weights, "model.extra": torch.zeros(1)})
    with pytest.raises(OfficialWeightsError, match=r"layers\.0\.linear_attn\.A_log has shape \(3,\)"):
        load_official(model, {**weights, "model.layers.0.linear_attn.A_log": torch.zeros(3)})
    with pytest.raises(OfficialWeightsError, match=r"fwpkm\.values has shape"):
        load_official(model, {**weights, "model.layers.2.fwpkm.values": torch.zeros(3)})
    assert torch.equal(official_weights(model)["model.norm.weight"], before)
    load_official(model, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})  # a tied one, twice


def test_configuration() -> None:
    config, vocab_size = decoder_config(official(CASES[0]))
    assert vocab_size == 61
    assert config.mixers == ("gated_delta_net", "sliding_attention", "gated_delta_net", "full_attention")
    assert (config.window, config.rotary_dim, config.tied_embeddings) == (6, 4, True)
    assert (config.memory_layers, config.pkm_layers, config.memory.chunk_size) == ((2,), (1,), 8)
    assert (config.delta_net.key_heads, config.delta_net.value_heads) == (2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fwpkm_dropout": 0.1}, "unknown keys fwpkm_dropout"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"fwpkm_before_attn": False}, "fwpkm_before_attn"),
        ({"fwpkm_loss_type": "l1"}, "fwpkm_loss_type"),
        ({"fwpkm_addr_loss": "kl"}, "fwpkm_addr_loss is 'kl'; allowed: 'me', None"),
        ({"fwpkm_compress_value": "tanh"}, "fwpkm_compress_value"),
        ({"fwpkm_target_lookahead": 2}, "never reads"),
        ({"layer_types": ["mamba"] * 4}, "layer_types has mamba"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": None}, "layer_types is missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"fwpkm_topk": 9}, "topk is 9"),
        ({"num_key_value_heads": 3}, "multiple of key_value_heads"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "only yarn"),
        ({"fwpkm_layers": [7]}, "memory_layers"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OfficialConfigError, match=message):
        decoder_config({**official(CASES[0]), **changes})


def test_other_settings_are_translated() -> None:
    changes = {
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
        "fwpkm_addr_loss": None,
        "fwpkm_compress_value": None,
        "fwpkm_target_lookahead": 1,
        "fwpkm_layers": None,
    }
    config, _ = decoder_config({**official(CASES[0]), **changes})
    assert config.rope_scaling == YarnConfig(factor=8.0, original_length=64)
    assert config.memory.addressing_loss == "none" and not config.memory.normalize_value
    assert config.memory_layers == ()


def copy_case(path: Path, folder: Path, **arrays: np.ndarray) -> Path:
    """A case with some of its arrays changed."""
    for suffix in (".json", ".safetensors"):
        shutil.copy(path.with_suffix(suffix), folder)
    with np.load(path.with_suffix(".npz")) as content:
        np.savez(folder / f"{path.stem}.npz", **{**content, **arrays})
    return folder / path.name


def test_a_wrong_or_additional_array_fails(tmp_path: Path) -> None:
    with np.load(CASES[0].with_suffix(".npz")) as content:
        gradient = content["grad/model.layers.3.self_attn.k_norm.weight"] * 1.001
    changed = copy_case(CASES[0], tmp_path, **{"grad/model.layers.3.self_attn.k_norm.weight": gradient})
    failed = [array.name for array in replay_model_case(changed).arrays if not array.passed]
    assert failed == ["grad/model.layers.3.self_attn.k_norm.weight"]
    more = copy_case(CASES[0], tmp_path, **{"layer9.keys_final": np.zeros(3)})
    assert [a.name for a in replay_model_case(more).arrays if not a.passed] == ["layer9.keys_final (never computed)"]
    changed.with_suffix(".safetensors").write_bytes(b"no")
    with pytest.raises(GoldenCaseError, match="not a usable model case"):
        replay_model_case(changed)


def test_verify_command(tmp_path: Path) -> None:
    """Both kinds of case in one call; exit 1 when a model case is wrong, 2 when it can't be read."""
    layer = next((ROOT / "tests" / "golden").glob("11_*.json"))
    mixed, wrong = tmp_path / "mixed", tmp_path / "wrong"
    mixed.mkdir()
    wrong.mkdir()
    for path in (layer, layer.with_suffix(".npz")):
        shutil.copy(path, mixed)
    copy_case(CASES[2], mixed)
    passed = run_command("verify", "--cases", mixed, "--dtype", "float64")
    assert "memory layer, float64" in passed and "whole models, float64" in passed
    assert "2 cases, 0 arrays out of tolerance" in passed
    copied = copy_case(CASES[2], wrong, logits=np.zeros((1, 26, 61)))
    failed = run_command("verify", "--cases", mixed, "--cases", wrong, "--dtype", "float64", expected=1)
    assert "FAILED" in failed and "3 cases, 1 arrays" in failed
    copied.write_text("{")
    run_command("verify", "--cases", wrong, expected=2)


def test_kinds_of_case() -> None:
    assert is_model_case(json.loads(CASES[0].read_text()))
    assert not is_model_case(json.loads(next((ROOT / "tests" / "golden").glob("*.json")).read_text()))


@pytest.mark.parametrize("kept", [{"input_ids", "labels", "loss"}, None])
def test_a_truncated_case_is_no_case(tmp_path: Path, kept: set[str] | None) -> None:
    for ending in (".json", ".safetensors"):
        shutil.copy(CASES[0].with_suffix(ending), tmp_path)
    with np.load(CASES[0].with_suffix(".npz")) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    gradient = next(name for name in content if name.startswith("gradnorm/"))
    content = {name: array for name, array in content.items() if (name in kept if kept else name != gradient)}
    np.savez(tmp_path / "0_mix_train.npz", **content)
    with pytest.raises(GoldenCaseError, match=r"the \.npz (lacks|has no gradient norm of)"):
        replay_model_case(tmp_path / "0_mix_train.json", torch.float64)
