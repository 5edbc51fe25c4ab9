"""Configurations of the paper's official code (its config.json) as a `DecoderConfig`, and back.

Every key is translated, or must have the one value that this implementation has, or says nothing about the
mathematics; anything else is an error, so that no setting is dropped in silence. The config.json of a model that was
exported for transformers has the same keys and a few that the official code lacks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_fwpkm.compatibility import mend_torchvision
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.model.settings import DecoderConfig, Mixer

_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class OfficialConfigError(UserError):
    """A configuration can't be translated; the message names the key, its value and what is possible."""


_MIXERS: dict[str, Mixer] = {
    "linear_attention": "gated_delta_net",
    "sliding_attention": "sliding_attention",
    "full_attention": "full_attention",
}
# Our field -> their key. Sizes must be there: the paper's code takes absent ones from a library's other defaults.
_DECODER = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "attention_heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rotary_fraction": "partial_rotary_factor",
    "rotary_base": "rope_theta",
    "mlp_size": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "initial_std": "initializer_range",
    "tied_embeddings": "tie_word_embeddings",
}
_MAY_BE_ABSENT = {"partial_rotary_factor", "rope_theta", "initializer_range"}  # our defaults are theirs
_DELTA_NET = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_head_dim": "linear_key_head_dim",
    "value_head_dim": "linear_value_head_dim",
    "conv_kernel": "linear_conv_kernel_dim",
}
_MEMORY = {
    "heads": "fwpkm_heads",
    "topk": "fwpkm_topk",
    "n_subkeys": "fwpkm_n_subkeys",
    "k_dim": "fwpkm_k_dim",
    "v_dim": "fwpkm_v_dim",
    "chunk_size": "fwpkm_update_chunk_size",
    "lookahead": "fwpkm_target_value_lookahead",
    "score_type": "fwpkm_qk_score_type",
    "score_nonlinearity": "fwpkm_score_nonlinear",
    "temperature": "fwpkm_score_temperature",
    "learning_rate": "fwpkm_optimizer_lr",
    "weight_decay": "fwpkm_optimizer_weight_decay",
    "gradient_clip": "fwpkm_grad_clip",
    "addressing_loss_weight": "fwpkm_addr_loss_weight",
    "values_only": "fwpkm_mem_grad_to_values_only",
    "weigh_write_by_gate": "fwpkm_weight_loss_with_gates",
    "fuse_output_by_gate": "fwpkm_out_fuse_gate",
}
# What only exported models have.
_MEMORY_EXPORTED = {
    "gate_outputs": "fwpkm_gate_outputs",
    "key_gradient": "fwpkm_key_gradient",
    "reset": "fwpkm_reset",
    "cache_mode": "cache_mode",
    "cache_memory": "memory_mode",
}
_PKM = {
    "heads": "pkm_heads",
    "topk": "pkm_topk",
    "n_subkeys": "pkm_n_subkeys",
    "k_dim": "pkm_k_dim",
    "v_dim": "pkm_v_dim",
}
_OTHERS = {
    *("vocab_size", "layer_types", "sliding_window", "rope_scaling", "fwpkm_layers", "pkm_layers"),
    *("fwpkm_addr_loss", "fwpkm_compress_value", "fwpkm_target_lookahead"),
}
OFFICIAL_TYPE, EXPORTED_TYPE = "qwen3_next_mem", "fwpkm"
"""Values of model_type."""
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "fwpkm_before_attn": True,
    "fwpkm_compress_query": None,
    "fwpkm_loss_type": "mse",
    "fwpkm_optimizer_type": "sgd",
    "fwpkm_query_src": "hidden",
    "fwpkm_value_src": "hidden",
    "fwpkm_variant": "pkm",
    "pkm_query_rmsnorm": True,
}
# Derived from others, limits that ours does not have, or about storage: fast weights are float32 here whatever
# fwpkm_fp32_fw says.
_SAY_NOTHING = {"num_fwpkm_layers", "max_position_embeddings", "use_cache", "fwpkm_fp32_fw", "auto_map"}
_OFFICIAL_GATE_OUTPUTS = 8
_USES_OF_EXPORTED = {"freeze_memory", "carry_memory"}  # how a call uses the memory, not what the model is
_ADDRESSING_LOSSES = {"me": "marginal_entropy", None: "none"}
_NORMALIZATIONS = {"zero_mean": True, None: False}
_YARN = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}


def decoder_config(official: Mapping[str, Any]) -> tuple[DecoderConfig, int]:
    """The decoder's configuration and the vocabulary's size.

    Raises:
        OfficialConfigError: keys that are unknown, missing or have values that are not supported.
    """
    _check_keys(official)
    if official.get("model_type") == EXPORTED_TYPE:  # transformers may leave out what is as usual
        official = {"tie_word_embeddings": True, **official}
    kinds = _required(official, "layer_types")
    if not isinstance(kinds, list | tuple):
        raise OfficialConfigError(f"layer_types is {kinds!r}; it must be a list of names")
    wrong = sorted({str(kind) for kind in kinds} - set(_MIXERS))
    if wrong:
        raise OfficialConfigError(f"layer_types has {', '.join(wrong)}; known are {', '.join(_MIXERS)}")
    if len(kinds) != _required(official, "num_hidden_layers"):
        raise OfficialConfigError(
            f"layer_types has {len(kinds)} entries, num_hidden_layers is {official['num_hidden_layers']}"
        )
    for key in (set(_DECODER.values()) - _MAY_BE_ABSENT) | (
        set(_DELTA_NET.values()) if "linear_attention" in kinds else set()
    ):
        _required(official, key)
    settings = _translate(official, _DECODER)
    if "sliding_attention" in kinds or official.get("sliding_window") is not None:
        settings["window"] = _required(official, "sliding_window")
    content = {
        **settings,
        "mixers": [_MIXERS[kind] for kind in kinds],
        "rope_scaling": _rope_scaling(official),
        "delta_net": _translate(official, _DELTA_NET),
        "memory_layers": official.get("fwpkm_layers") or (),
        "memory": _memory(official),
        "pkm_layers": official.get("pkm_layers") or (),
        "pkm": _translate(official, _PKM),
    }
    try:
        config = TypeAdapter(DecoderConfig).validate_python(content)
        vocab_size = TypeAdapter(_Size).validate_python(_required(official, "vocab_size"))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'values'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise OfficialConfigError(f"the configuration can't be used: {'; '.join(problems)}") from error
    return config, vocab_size


def _check_keys(official: Mapping[str, Any]) -> None:
    kind = official.get("model_type", OFFICIAL_TYPE)
    if kind not in (OFFICIAL_TYPE, EXPORTED_TYPE):
        raise OfficialConfigError(f"model_type is {kind!r}; only {OFFICIAL_TYPE!r} and {EXPORTED_TYPE!r} are supported")
    translated = {key for part in (_DECODER, _DELTA_NET, _MEMORY, _PKM) for key in part.values()}
    known = translated | _OTHERS | set(_ONLY) | _SAY_NOTHING | _keys_of_the_library()
    if kind == EXPORTED_TYPE:
        known |= {*_MEMORY_EXPORTED.values(), *_USES_OF_EXPORTED}
    unknown = sorted(set(official) - known)
    if unknown:
        raise OfficialConfigError(f"unknown keys {', '.join(unknown)}: nothing here corresponds to them")
    for key, only in _ONLY.items():
        if key in official and official[key] != only:
            raise OfficialConfigError(f"{key} is {official[key]!r}; only {only!r} is supported")


@functools.cache
def _keys_of_the_library() -> frozenset[str]:
    """Keys that transformers writes into every config.json: generation, labels, versions."""
    mend_torchvision()
    from transformers import PretrainedConfig

    return frozenset({*PretrainedConfig().to_dict(), "torch_dtype", "architectures"})


def _required(official: Mapping[str, Any], key: str) -> Any:
    if official.get(key) is None:
        raise OfficialConfigError(f"{key} is missing")
    return official[key]


def _translate(official: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: official[theirs] for ours, theirs in names.items() if theirs in official}


def _memory(official: Mapping[str, Any]) -> dict[str, Any]:
    settings = _translate(official, _MEMORY)
    if official.get("model_type") == EXPORTED_TYPE:
        settings |= _translate(official, _MEMORY_EXPORTED)
    tables: tuple[tuple[str, str, dict[Any, Any]], ...] = (
        ("addressing_loss", "fwpkm_addr_loss", _ADDRESSING_LOSSES),
        ("normalize_value", "fwpkm_compress_value", _NORMALIZATIONS),
    )
    for ours, key, values in tables:
        if key in official:
            if official[key] not in values:
                raise OfficialConfigError(f"{key} is {official[key]!r}; allowed: {', '.join(map(repr, values))}")
            settings[ours] = values[official[key]]
    # The released files spell it so, but that code reads fwpkm_target_value_lookahead only.
    lookahead = settings.get("lookahead", MemoryConfig().lookahead)
    if official.get("fwpkm_target_lookahead", lookahead) != lookahead:
        raise OfficialConfigError(
            f"fwpkm_target_lookahead is {official['fwpkm_target_lookahead']}, which the official code never reads (its "
            f"lookahead is {lookahead}); remove it, or set fwpkm_target_value_lookahead"
        )
    return settings


def _rope_scaling(official: Mapping[str, Any]) -> dict[str, Any] | None:
    scaling = official.get("rope_scaling")
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise OfficialConfigError(f"rope_scaling is {scaling!r}; it must be a mapping or null")
    kind = scaling.get("rope_type", scaling.get("type"))
    unknown = sorted(set(scaling) - set(_YARN.values()) - {"rope_type", "type"})
    if kind != "yarn" or unknown:
        keys = ", ".join(_YARN.values())
        raise OfficialConfigError(f"rope_scaling is {dict(scaling)!r}; only yarn with {keys} is supported")
    settings = _translate(scaling, _YARN)
    settings.setdefault("original_length", official.get("max_position_embeddings"))
    return settings


def official_config(config: DecoderConfig, vocab_size: int, max_positions: int) -> dict[str, Any]:
    """The official code's configuration of a decoder; `max_positions` are the tokens of a sequence in training.

    Raises:
        OfficialConfigError: a setting that the official code does not have.
    """
    if config.memory_layers and config.memory.gate_outputs != _OFFICIAL_GATE_OUTPUTS:
        raise OfficialConfigError(
            f"memory.gate_outputs is {config.memory.gate_outputs}; the official code has {_OFFICIAL_GATE_OUTPUTS}"
        )
    return {
        **_common_config(config, vocab_size, max_positions),
        **_ONLY,
        "num_fwpkm_layers": len(config.memory_layers),
        "fwpkm_fp32_fw": True,
        "model_type": OFFICIAL_TYPE,
    }


def exported_config(config: DecoderConfig, vocab_size: int, max_positions: int) -> dict[str, Any]:
    """The configuration of a decoder as the model files for transformers take it."""
    exported = {theirs: getattr(config.memory, ours) for ours, theirs in _MEMORY_EXPORTED.items()}
    return {**_common_config(config, vocab_size, max_positions), **exported, "model_type": EXPORTED_TYPE}


def _common_config(config: DecoderConfig, vocab_size: int, max_positions: int) -> dict[str, Any]:
    names = {mixer: name for name, mixer in _MIXERS.items()}
    losses, normalizations = (
        {ours: theirs for theirs, ours in x.items()} for x in (_ADDRESSING_LOSSES, _NORMALIZATIONS)
    )
    scaling = config.rope_scaling
    parts = ((config, _DECODER), (config.delta_net, _DELTA_NET), (config.memory, _MEMORY), (config.pkm, _PKM))
    return {
        **{theirs: getattr(part, ours) for part, table in parts for ours, theirs in table.items()},
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "layer_types": [names[config.mixer(index)] for index in range(config.layers)],
        "sliding_window": config.window,
        "rope_scaling": None
        if scaling is None
        else {"rope_type": "yarn", **{theirs: getattr(scaling, ours) for ours, theirs in _YARN.items()}},
        "fwpkm_layers": sorted(config.memory_layers),
        "fwpkm_addr_loss": losses[config.memory.addressing_loss],
        "fwpkm_compress_value": normalizations[config.memory.normalize_value],
        "pkm_layers": sorted(config.pkm_layers),
    }
