"""Configuration of decoders with fast-weight product key memory (FwPKM, arXiv 2601.00671)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

LAYER_TYPES = ("linear_attention", "sliding_attention", "full_attention")


class FwPKMConfig(PretrainedConfig):
    """Sizes of the decoder, its memories, and how memories are used at inference.

    Sizes have the names of the paper's code. Those of inference:

        memory_mode: "per_sequence" (one memory for each sequence of a batch) or "shared" (one for the whole batch)
        cache_mode: "aligned" (a chunk is written when it is complete, wherever calls are cut: as in training) or
            "official" (as the paper's code writes with a cache)
        freeze_memory: read only; nothing is written
        carry_memory: what a call has written (of one sequence, or shared) becomes the stored memory

    Raises ValueError for what does not fit together.
    """

    model_type = "fwpkm"
    keys_to_ignore_at_inference = ("past_key_values",)

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
        fwpkm_compress_value: bool | str | None = "zero_mean",
        fwpkm_gate_outputs: int = 8,
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
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.layer_types = list(layer_types or ["sliding_attention"] * num_hidden_layers)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.sliding_window = sliding_window
        self.linear_num_key_heads = linear_num_key_heads
        self.linear_num_value_heads = linear_num_value_heads
        self.linear_key_head_dim = linear_key_head_dim
        self.linear_value_head_dim = linear_value_head_dim
        self.linear_conv_kernel_dim = linear_conv_kernel_dim
        self.intermediate_size = intermediate_size
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.fwpkm_layers = list(fwpkm_layers or [])
        self.fwpkm_heads = fwpkm_heads
        self.fwpkm_topk = fwpkm_topk
        self.fwpkm_n_subkeys = fwpkm_n_subkeys
        self.fwpkm_k_dim = fwpkm_k_dim
        self.fwpkm_v_dim = fwpkm_v_dim
        self.fwpkm_update_chunk_size = fwpkm_update_chunk_size
        self.fwpkm_target_value_lookahead = fwpkm_target_value_lookahead
        self.fwpkm_qk_score_type = fwpkm_qk_score_type
        self.fwpkm_score_nonlinear = fwpkm_score_nonlinear
        self.fwpkm_score_temperature = fwpkm_score_temperature
        self.fwpkm_optimizer_lr = fwpkm_optimizer_lr
        self.fwpkm_optimizer_weight_decay = fwpkm_optimizer_weight_decay
        self.fwpkm_grad_clip = fwpkm_grad_clip
        self.fwpkm_addr_loss = fwpkm_addr_loss
        self.fwpkm_addr_loss_weight = fwpkm_addr_loss_weight
        self.fwpkm_mem_grad_to_values_only = fwpkm_mem_grad_to_values_only
        self.fwpkm_weight_loss_with_gates = fwpkm_weight_loss_with_gates
        self.fwpkm_out_fuse_gate = fwpkm_out_fuse_gate
        self.fwpkm_compress_value = fwpkm_compress_value
        self.fwpkm_gate_outputs = fwpkm_gate_outputs
        self.pkm_layers = list(pkm_layers or [])
        self.pkm_heads = pkm_heads
        self.pkm_topk = pkm_topk
        self.pkm_n_subkeys = pkm_n_subkeys
        self.pkm_k_dim = pkm_k_dim
        self.pkm_v_dim = pkm_v_dim
        self.memory_mode = memory_mode
        self.cache_mode = cache_mode
        self.freeze_memory = freeze_memory
        self.carry_memory = carry_memory
        self._check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, use_cache=use_cache, **kwargs)

    def _check(self) -> None:
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must name {', '.join(LAYER_TYPES)} for each of {self.num_hidden_layers} layers, not "
                f"{self.layer_types}"
            )
        for name, allowed in (("memory_mode", ("per_sequence", "shared")), ("cache_mode", ("aligned", "official"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")
