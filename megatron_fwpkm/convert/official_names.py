"""Weights of the paper's official code by name, and the same weights of a `Decoder`, in both directions.

Names and shapes follow from the configuration. Most weights are the same tensor under another name; sub-keys have
another shape, and the delta net's convolution another order of channels: theirs has all queries, then all keys, then
all values, ours one key head after the other, so that a tensor-parallel rank's share is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_fwpkm.errors import UserError
from megatron_fwpkm.memory.pkm_layer import named_slow_weights
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig, DeltaNetConfig

Change = Callable[[Tensor], Tensor]


class OfficialWeightsError(UserError):
    """Weights don't fit the configuration; the message names those that are missing, unknown or of another shape."""


@dataclass(frozen=True)
class SlowName:
    """A slow weight: `ours` is its name in the Decoder."""

    official: str
    ours: str
    from_official: Change = lambda tensor: tensor
    to_official: Change = lambda tensor: tensor


@dataclass(frozen=True)
class FastName:
    """Keys or values of the fast state of one block."""

    official: str
    block: int
    part: Literal["keys", "values"]


_ATTENTION = {
    "query_gate.weight": "q_proj.weight",
    "key.weight": "k_proj.weight",
    "value.weight": "v_proj.weight",
    "output.weight": "o_proj.weight",
    "query_norm.weight": "q_norm.weight",
    "key_norm.weight": "k_norm.weight",
}
_DELTA_NET = {
    "in_qkvz.weight": "in_proj_qkvz.weight",
    "in_ba.weight": "in_proj_ba.weight",
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "output_norm.weight": "norm.weight",
    "output.weight": "out_proj.weight",
}
_MLP = {"gate.weight": "gate_proj.weight", "up.weight": "up_proj.weight", "down.weight": "down_proj.weight"}
_PKM = {
    "query_projection.weight": "query_proj.query_mlps.0.weight",
    "query_projection.bias": "query_proj.query_mlps.0.bias",
    "query_norm.weight": "query_proj.norm.weight",
    "gate_projection.weight": "swilu_projection.weight",
    "gate_projection.bias": "swilu_projection.bias",
    "output_projection.weight": "value_proj.weight",
    "output_projection.bias": "value_proj.bias",
    "values": "values.weight",
}
_MEMORY_NORMS = {
    "query_norm": "fw_q_norm",
    "value_norm": "fw_v_norm",
    "gate_norm": "fw_out_gate_norm",
    "output_norm": "fw_out_norm",
}
_MEMORY_PROJECTIONS = {
    "query_projection": "fw_q_proj",
    "value_projection": "fw_v_proj",
    "gate_projection": "fw_out_gate",
    "output_projection": "fw_out_proj",
}


def slow_names(config: DecoderConfig) -> Iterator[SlowName]:
    """Every slow weight of a model."""
    yield SlowName("model.embed_tokens.weight", "embedding.weight")
    yield SlowName("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield SlowName("lm_head.weight", "head.weight")
    for index in range(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield SlowName(theirs + "input_layernorm.weight", ours + "mixer_norm.weight")
        yield SlowName(theirs + "post_attention_layernorm.weight", ours + "mlp_norm.weight")
        yield from _mixer_names(config, index, ours + "mixer.", theirs)
        yield from _mlp_names(config, index, ours + "mlp.", theirs)
        if index in config.memory_layers:
            yield from _renamed(_memory_names(), ours + "memory.", theirs)


def fast_names(config: DecoderConfig) -> Iterator[FastName]:
    """Every tensor of fast state of a model."""
    for index in sorted(config.memory_layers):
        yield FastName(f"model.layers.{index}.fwpkm.keys", index, "keys")
        yield FastName(f"model.layers.{index}.fwpkm.values", index, "values")


def _renamed(names: dict[str, str], ours: str, theirs: str) -> Iterator[SlowName]:
    for name, other in names.items():
        yield SlowName(theirs + other, ours + name)


def _memory_names() -> dict[str, str]:
    norms = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _MEMORY_NORMS.items()}
    parts = ((ours, theirs, part) for ours, theirs in _MEMORY_PROJECTIONS.items() for part in ("weight", "bias"))
    return norms | {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs, part in parts}


def _mixer_names(config: DecoderConfig, index: int, ours: str, theirs: str) -> Iterator[SlowName]:
    if config.mixer(index) != "gated_delta_net":
        yield from _renamed(_ATTENTION, ours, theirs + "self_attn.")
        return
    yield from _renamed(_DELTA_NET, ours, theirs + "linear_attn.")
    order = _channel_order(config.delta_net)
    back = torch.argsort(order)
    yield SlowName(
        theirs + "linear_attn.conv1d.weight",
        ours + "convolution",
        lambda tensor: tensor.squeeze(1)[order],
        lambda tensor: tensor[back].unsqueeze(1),
    )


def _channel_order(sizes: DeltaNetConfig) -> Tensor:
    """For each of our convolution's channels, the number of the official one."""
    keys = sizes.key_heads * sizes.key_head_dim
    values = sizes.value_heads * sizes.value_head_dim
    queries, others, rest = torch.arange(2 * keys + values).split((keys, keys, values))
    by_head = [part.view(sizes.key_heads, -1) for part in (queries, others, rest)]
    return torch.cat(by_head, 1).flatten()


def _mlp_names(config: DecoderConfig, index: int, ours: str, theirs: str) -> Iterator[SlowName]:
    if index not in config.pkm_layers:
        yield from _renamed(_MLP, ours, theirs + "mlp.")
        return
    yield from _renamed(_PKM, ours, theirs + "pkm.")
    shape = (config.pkm.heads, 2, config.pkm.n_subkeys, config.pkm.k_dim // 2)
    yield SlowName(
        theirs + "pkm.keys", ours + "keys", lambda tensor: tensor.view(shape), lambda tensor: tensor.flatten(0, 2)
    )


def _check_shape(name: str, given: Tensor, wanted: Tensor) -> None:
    if given.shape != wanted.shape:
        raise OfficialWeightsError(
            f"{name} has shape {tuple(given.shape)}, this configuration wants {tuple(wanted.shape)}"
        )


@torch.no_grad()
def load_official(model: Decoder, weights: dict[str, Tensor]) -> None:
    """Set all slow weights and fast states of a model from official ones, cast to the model's dtypes.

    Raises:
        OfficialWeightsError: before anything is changed, when names or shapes are not those of the model.
    """
    slow, fast = list(slow_names(model.config)), list(fast_names(model.config))
    known = {name.official for name in slow} | {name.official for name in fast}
    # Checkpoints of tied models may hold the head's weight a second time.
    given = set(weights) - ({"lm_head.weight"} if model.config.tied_embeddings else set())
    if given != known:
        missing, unknown = sorted(known - given), sorted(given - known)
        raise OfficialWeightsError(
            f"the weights are not those of this configuration: missing {_some(missing)}, unknown {_some(unknown)}"
        )
    parameters = dict(named_slow_weights(model))
    for name in slow:
        _check_shape(name.official, weights[name.official], name.to_official(parameters[name.ours]))
    states = dict(model.fast_states())
    for fast_name in fast:
        state = states[fast_name.block]
        whole = state.keys_H2nd.flatten(0, 2) if fast_name.part == "keys" else state.table_ND
        _check_shape(fast_name.official, weights[fast_name.official], whole)
    for name in slow:
        parameters[name.ours].copy_(name.from_official(weights[name.official]))
    for index, state in states.items():
        prefix = f"model.layers.{index}.fwpkm."
        state.replace(weights[prefix + "keys"].view(state.keys_H2nd.shape), weights[prefix + "values"])


def official_weights(model: Decoder) -> dict[str, Tensor]:
    """All slow weights and fast states of a model under official names; slow ones share storage where they can."""
    parameters, states = dict(named_slow_weights(model)), dict(model.fast_states())
    found = {name.official: name.to_official(parameters[name.ours].detach()) for name in slow_names(model.config)}
    for name in fast_names(model.config):
        state = states[name.block]
        found[name.official] = state.keys_H2nd.flatten(0, 2) if name.part == "keys" else state.values_ND()
    return found


def official_gradients(model: Decoder) -> dict[str, Tensor]:
    """Gradients of the slow weights that have one, dense, under official names."""
    parameters = dict(named_slow_weights(model))
    found = {}
    for name in slow_names(model.config):
        gradient = parameters[name.ours].grad
        if gradient is not None:
            found[name.official] = name.to_official(gradient.to_dense() if gradient.is_sparse else gradient)
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names) or "none"
