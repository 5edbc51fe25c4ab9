"""Configuration of decoders with fast-weight product key memory (FwPKM, arXiv 2601.00671).

Needs transformers alone, 4.57 or 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import transformers
from transformers import PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_fwpkm.FwPKMConfig",
    "AutoModel": "modeling_fwpkm.FwPKMModel",
    "AutoModelForCausalLM": "modeling_fwpkm.FwPKMForCausalLM",
}
"""What config.json says of these files, so that trust_remote_code finds them."""

LAYER_TYPES = ("linear_attention", "sliding_attention", "full_attention")

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "memory_mode": ("per_sequence", "shared"),
    "cache_mode": ("aligned", "official"),
    "fwpkm_qk_score_type": ("idw", "dot_product"),
    "fwpkm_score_nonlinear": ("softmax", "silu", "relu"),
    "fwpkm_addr_loss": ("me", None),
    "fwpkm_compress_value": ("zero_mean", None),
    "fwpkm_key_gradient": ("exact", "official"),
}
# Keys of the paper's code that have one value here.
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
# Keys that say nothing about what is computed here, and one that is checked on its own.
_IGNORED = {"fwpkm_fp32_fw", "fwpkm_reset", "fwpkm_target_lookahead"}
_AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "intermediate_size", "fwpkm_heads", "fwpkm_topk", "fwpkm_n_subkeys", "fwpkm_k_dim"),
    *("fwpkm_v_dim", "fwpkm_gate_outputs", "pkm_heads", "pkm_topk", "pkm_n_subkeys", "pkm_k_dim", "pkm_v_dim"),
)
_YARN_KEYS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}
_ROPE_KEY = "rope_parameters" if int(transformers.__version__.split(".")[0]) >= 5 else "rope_scaling"
"""Where this version of transformers keeps RoPE's settings. Files have the names that both read."""


@dataclass(frozen=True)
class Rope:
    """RoPE's settings; `yarn` stretches it to longer contexts, None leaves it as trained."""

    theta: float
    fraction: float
    yarn: dict[str, Any] | None


class FwPKMConfig(PretrainedConfig):
    """Sizes of the decoder and its memories, and how memories are used at inference.

    Sizes have the names of the paper's code. Those of inference, which may be changed at any time:

        memory_mode: "per_sequence" (one memory for each sequence of a batch) or "shared" (one for the whole batch)
        cache_mode: "aligned" (a chunk is written when it is complete, wherever calls are cut, as in training) or
            "official" (as the paper's code writes with a cache)
        freeze_memory: read only; nothing is written
        carry_memory: what a call has written becomes the stored memory

    Raises ValueError, with the key's name, for values that are unknown or do not fit together.
    """

    model_type = "fwpkm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        layer_types: list[str] | None = None,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 64,
        partial_rotary_factor: float = 0.25,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        sliding_window: int | None = 64,
        linear_num_key_heads: int = 4,
        linear_num_value_heads: int = 4,
        linear_key_head_dim: int = 64,
        linear_value_head_dim: int = 64,
        linear_conv_kernel_dim: int = 4,
        intermediate_size: int = 640,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        max_position_embeddings: int = 4096,
        fwpkm_layers: list[int] | None = None,
        fwpkm_heads: int = 1,
        fwpkm_topk: int = 8,
        fwpkm_n_subkeys: int = 512,
        fwpkm_k_dim: int = 512,
        fwpkm_v_dim: int = 512,
        fwpkm_update_chunk_size: int | str = 512,
        fwpkm_target_value_lookahead: int = 1,
        fwpkm_qk_score_type: str = "idw",
        fwpkm_score_nonlinear: str = "softmax",
        fwpkm_score_temperature: float = 1.0,
        fwpkm_optimizer_lr: float = 1.0,
        fwpkm_optimizer_weight_decay: float = 0.0,
        fwpkm_grad_clip: bool = False,
        fwpkm_addr_loss: str | None = "me",
        fwpkm_addr_loss_weight: float = 1.0,
        fwpkm_mem_grad_to_values_only: bool = True,
        fwpkm_weight_loss_with_gates: bool = True,
        fwpkm_out_fuse_gate: bool = True,
        fwpkm_compress_value: str | None = "zero_mean",
        fwpkm_gate_outputs: int = 8,
        fwpkm_key_gradient: str = "exact",
        pkm_layers: list[int] | None = None,
        pkm_heads: int = 4,
        pkm_topk: int = 32,
        pkm_n_subkeys: int = 512,
        pkm_k_dim: int = 512,
        pkm_v_dim: int = 512,
        memory_mode: str = "per_sequence",
        cache_mode: str = "aligned",
        freeze_memory: bool = False,
        carry_memory: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        # Arguments are attributes under the same names, but for those that need a second look.
        given = dict(locals())
        special = {"self", "kwargs", "__class__", "rope_scaling", "layer_types", "fwpkm_layers", "pkm_layers"}
        for name in given.keys() - special:
            setattr(self, name, given[name])
        self.layer_types = list(layer_types or ["sliding_attention"] * num_hidden_layers)
        self.fwpkm_layers, self.pkm_layers = list(fwpkm_layers or []), list(pkm_layers or [])
        rope = dict(kwargs.pop("rope_parameters", None) or rope_scaling or {})
        # transformers 5 puts all of RoPE into one dictionary; the names of the paper's code stand beside it.
        self.rope_theta = rope.pop("rope_theta", rope_theta)
        self.partial_rotary_factor = rope.pop("partial_rotary_factor", partial_rotary_factor)
        setattr(self, _ROPE_KEY, rope or None)
        for name in kwargs:
            if name.startswith(("fwpkm_", "pkm_")) and name not in _ONLY and name not in _IGNORED:
                raise ValueError(f"{name} is no setting of these models")
        for name, only in _ONLY.items():
            if kwargs.get(name, only) != only:
                raise ValueError(f"{name} is {kwargs[name]!r}; allowed: {only!r}")
        if kwargs.get("fwpkm_target_lookahead", fwpkm_target_value_lookahead) != fwpkm_target_value_lookahead:
            raise ValueError("fwpkm_target_lookahead is never read; set fwpkm_target_value_lookahead")
        self.check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, use_cache=use_cache, **kwargs)

    @property
    def rope(self) -> Rope:
        """RoPE's settings, wherever this version of transformers keeps them."""
        given = dict(getattr(self, _ROPE_KEY) or {})
        kind = given.pop("rope_type", given.pop("type", None if given.keys() & _YARN_KEYS else "default"))
        theta = given.pop("rope_theta", self.rope_theta)
        fraction = given.pop("partial_rotary_factor", self.partial_rotary_factor)
        given.pop("type", None)
        if kind == "default" and not given:
            return Rope(theta, fraction, None)
        if kind != "yarn" or not given.keys() <= _YARN_KEYS or "factor" not in given:
            raise ValueError(
                f"rope_scaling is {getattr(self, _ROPE_KEY)!r}; allowed: None, or rope_type 'yarn' with factor and "
                f"of {', '.join(sorted(_YARN_KEYS))}"
            )
        return Rope(theta, fraction, given)

    def to_dict(self) -> dict[str, Any]:
        """As files hold it: RoPE under the names of the paper's code, whatever the version of transformers."""
        values: dict[str, Any] = super().to_dict()
        rope = self.rope
        values.pop("rope_parameters", None)
        values["rope_theta"], values["partial_rotary_factor"] = rope.theta, rope.fraction
        values["rope_scaling"] = None if rope.yarn is None else {"rope_type": "yarn", **rope.yarn}
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """As to_dict(), without what is as usual for all models; whether embeddings are tied is always told."""
        return {**super().to_diff_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    def check(self) -> None:
        """Raise ValueError unless all values are known and fit together; models do so when they are made."""
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("freeze_memory", "carry_memory"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        self._check_layers()
        self._check_memories()
        fraction = self.rope.fraction
        if not 0 <= fraction <= 1 or int(self.head_dim * fraction) % 2:
            raise ValueError(
                f"partial_rotary_factor is {fraction}; it must leave an even part of head_dim, which is {self.head_dim}"
            )

    def _check_layers(self) -> None:
        unknown = sorted(set(map(str, self.layer_types)) - set(LAYER_TYPES))
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types is {self.layer_types}; it must name one of {', '.join(LAYER_TYPES)} for each of "
                f"{self.num_hidden_layers} layers"
            )
        for name in ("fwpkm_layers", "pkm_layers"):
            indices = getattr(self, name)
            if len(set(indices)) != len(indices) or not set(indices) <= set(range(self.num_hidden_layers)):
                raise ValueError(f"{name} is {indices}; it must be distinct numbers below {self.num_hidden_layers}")
        if "sliding_attention" in self.layer_types and not (self.sliding_window and self.sliding_window > 0):
            raise ValueError(f"sliding_window is {self.sliding_window!r}; sliding_attention needs at least 1")
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many} ({getattr(self, many)}) must be a multiple of {few} ({getattr(self, few)})")

    def _check_memories(self) -> None:
        chunk, lookahead = self.fwpkm_update_chunk_size, self.fwpkm_target_value_lookahead
        if not isinstance(lookahead, int) or lookahead < 0:
            raise ValueError(f"fwpkm_target_value_lookahead is {lookahead!r}; it must be a whole number of at least 0")
        if chunk != "sequence" and not (isinstance(chunk, int) and chunk > lookahead):
            raise ValueError(
                f"fwpkm_update_chunk_size is {chunk!r}; it must be 'sequence' or more tokens than "
                f"fwpkm_target_value_lookahead ({lookahead})"
            )
        for kind in ("fwpkm", "pkm"):
            topk, subkeys, width = (getattr(self, f"{kind}_{name}") for name in ("topk", "n_subkeys", "k_dim"))
            if topk > subkeys:
                raise ValueError(f"{kind}_topk ({topk}) must be at most {kind}_n_subkeys ({subkeys})")
            if width % 2:
                raise ValueError(f"{kind}_k_dim is {width}; it must be even")
        if not self.fwpkm_score_temperature > 0:
            raise ValueError(f"fwpkm_score_temperature is {self.fwpkm_score_temperature!r}; it must be above 0")
        if not 0 <= self.fwpkm_optimizer_lr * self.fwpkm_optimizer_weight_decay < 1:
            raise ValueError("fwpkm_optimizer_lr times fwpkm_optimizer_weight_decay must be at least 0 and below 1")
