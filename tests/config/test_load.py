"""Composition, overrides and the messages of the configuration loader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_fwpkm.config import (
    UserError,
    differing_keys,
    load_data_config,
    load_model_config,
    load_train_config,
    to_yaml,
)

CONFIGS = Path(__file__).parents[2] / "configs"
NANO = CONFIGS / "train" / "nano.yaml"


def test_presets_load() -> None:
    for path in sorted((CONFIGS / "train").glob("*.yaml")):
        load_train_config(path)
    for path in sorted((CONFIGS / "data").glob("*.yaml")):
        load_data_config(path)
    for path in sorted((CONFIGS / "model").glob("*.yaml")):
        load_model_config(path)


def test_sections_come_from_included_files_and_own_keys_win(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("hidden_size: 64\nlayers: 3\n")
    (tmp_path / "job.yaml").write_text("include: {model: model.yaml}\nmodel: {layers: 5}\nseed: 7\n")
    config = load_train_config(tmp_path / "job.yaml")
    assert (config.model.hidden_size, config.model.layers, config.seed) == (64, 5, 7)


def test_a_file_builds_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text(
        "hidden_size: 64\nlayers: 3\nmemory_layers: [0, 1]\nmemory: {heads: 2, topk: 4}\n"
    )
    (tmp_path / "model.yaml").write_text("base: common.yaml\nlayers: 5\nmemory_layers: [2]\nmemory: {topk: 2}\n")
    config = load_model_config(tmp_path / "model.yaml", ["mlp_size=9"])
    assert (config.hidden_size, config.layers, config.memory_layers, config.mlp_size) == (64, 5, (2,), 9)
    assert (config.memory.heads, config.memory.topk) == (2, 2)


def test_overrides_come_last() -> None:
    overrides = ["training.steps=77", "model.memory_layers=[0,3]", "model.rope_scaling=null", "name=other"]
    config = load_train_config(NANO, overrides)
    assert config.training.steps == 77
    assert config.model.memory_layers == (0, 3)
    assert config.model.rope_scaling is None
    assert config.name == "other"


def test_yaml_of_a_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_train_config(NANO, ["training.steps=123"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_train_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.step=5", "did you mean `training.steps`?"),
        ("model.hiden_size=5", "did you mean `model.hidden_size`?"),
        ("model.memory.top_k=5", "did you mean `model.memory.topk`?"),
        ("zzzz=5", "valid keys here are"),
        ("training.steps", "key.sub=value"),
        ("training.steps=many", "training.steps"),
        ("training.steps=0", "training.steps"),
        ("training.precision=fp8", "training.precision"),
        ("parallel.tensor=2", "parallel.tensor"),
        ("model.key_value_heads=2", "multiple of key_value_heads"),
        ("model.memory_layers=[9]", "memory_layers"),
        ("model.rotary_fraction=0.3", "even width"),
        ("model.window=null", "model.window"),
        ("model.mixers=[attention]", "model.mixers"),
        ("model.mixers=[]", "mixers must name at least one"),
        ("model.delta_net.key_heads=3", "multiple of key_heads"),
        ("model.delta_net.heads=3", "did you mean `model.delta_net."),
        ("model.pkm_layers=[4]", "pkm_layers"),
        ("model.rope_scaling={factor: 0.5, original_length: 64}", "at least 1"),
        ("model.rope_scaling={factor: 2}", "model.rope_scaling.original_length"),
        ("optimizer.warmup_steps=100000", "warmup_steps"),
        ("evaluation.sequences=1", "evaluation.sequences"),
        ("parallel.tensor=3", "model.key_value_heads (1) can't be divided over parallel.tensor (3) ranks"),
        ("training={zero_stage: 0, precision: bf16}", "zero_stage 0 keeps no float32 weights"),
        ("training.zero_stage=4", "training.zero_stage"),
        ("data.source=web", "data.source"),
        ("model.memory.topk=0", "topk"),
        (f"seed={2**63}", "seed: Input should be less than or equal to 9223372036854775807"),
        (f"data.shuffle_seed={2**63}", "data.shuffle_seed (9223372036854775808) must be at most"),
        (f"evaluation.needles.seed={2**63}", "evaluation.needles.seed"),
        ("training.steps=???", "override 'training.steps=???': ??? stands for a missing value"),
        ("model.memory={topk: '???'}", "??? stands for a missing value"),
        ("model.memory.reset=per_document", "set data.documents=separate"),
    ],
)
def test_mistakes_give_one_clear_message(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_train_config(NANO, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resetting_per_document_is_possible_where_documents_are_known() -> None:
    reset = "model.memory.reset=per_document"
    largest = f"seed={2**63 - 1}"
    assert load_train_config(NANO, [reset, "data.documents=separate", largest]).seed == 2**63 - 1
    assert load_train_config(NANO, [reset, "model.memory_layers=[]"]).data.documents == "joined"
    with pytest.raises(UserError, match=r"model\.memory\.reset=per_sequence"):
        load_train_config(NANO.with_name("recall.yaml"), [reset])


def test_unknown_key_in_a_file_names_file_and_nearest_key(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("optimizer: {learningrate: 1}\n")
    with pytest.raises(UserError, match=r"job\.yaml.*optimizer\.learningrate.*optimizer\.learning_rate"):
        load_train_config(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("5\n", "job.yaml: expected a mapping"),
        ("include: [a]\n", "include"),
        ("include: {model: job.yaml}\n", "includes itself"),
        ("include: {model: missing.yaml}\n", "no configuration file"),
        ("base: job.yaml\n", "includes itself"),
        ("base: missing.yaml\n", "no configuration file"),
        ("base: [a, b]\n", "`base` must name one"),
        ("name: ${nowhere}\n", "nowhere"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_train_config(tmp_path / "job.yaml")
    assert expected in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration file"):
        load_train_config(tmp_path / "none.yaml")


def test_differing_keys_are_dotted() -> None:
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c (2, 3)", "d (None, 4)"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.mlp_size=641"], "model.mlp_size (641) can't be divided over parallel.tensor (2) ranks"),
        (["model.mixers=[gated_delta_net]", "model.delta_net={key_heads: 3, value_heads: 3}"], "key_heads (3)"),
        (["parallel.sequence_parallel=true", "data.sequence_length=129"], "data.sequence_length (129)"),
        (["parallel.memory.sharding=columns", "model.memory.v_dim=129"], "model.memory.v_dim (129)"),
        (["parallel.memory.group=tp_3"], "it is tp, a replica's tensor-parallel ranks, or tp_dp_N"),
        (["parallel.memory.group=tp_dp_20", "model.memory.n_subkeys=32"], "n_subkeys (32) must be at least .* (40)"),
        (["model.pkm_layers=[0]", "model.pkm.n_subkeys=1", "model.pkm.topk=1"], "model.pkm.n_subkeys (1) must be at"),
        (
            ["parallel.memory.group=tp_dp_2", "model.memory.reset=per_document", "data.documents=separate"],
            "per_document doesn't go with memories of 2 replicas together (parallel.memory.group=tp_dp_2",
        ),
        (["parallel.pipeline=2", "training.zero_stage=2"], "parallel.pipeline (2) above 1"),
    ],
)
def test_sizes_that_a_layout_does_not_divide_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words).replace(r"\.\*", ".*")):
        heads = ["model.attention_heads=4", "model.key_value_heads=2"]
        load_train_config(NANO, [*heads, "parallel.tensor=2", "parallel.processes=4", *overrides])
