"""Exports for tests: a small model in a folder, as an outsider loads it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_fwpkm.convert.official_config import decoder_config
from megatron_fwpkm.convert.official_names import official_weights
from megatron_fwpkm.memory.config import Reset
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend

MODEL_FILES = Path(__file__).parents[2] / "megatron_fwpkm" / "convert" / "hf_model"
AUTO_MAP = {
    "AutoConfig": "configuration_fwpkm.FwPKMConfig",
    "AutoModel": "modeling_fwpkm.FwPKMModel",
    "AutoModelForCausalLM": "modeling_fwpkm.FwPKMForCausalLM",
}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "sliding_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "partial_rotary_factor": 0.5,
    "sliding_window": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "fwpkm_layers": [0, 2],
    "fwpkm_n_subkeys": 16,
    "fwpkm_k_dim": 16,
    "fwpkm_v_dim": 16,
    "fwpkm_topk": 4,
    "fwpkm_update_chunk_size": 5,
    "pkm_layers": [3],
    "pkm_heads": 2,
    "pkm_n_subkeys": 8,
    "pkm_k_dim": 8,
    "pkm_v_dim": 8,
    "pkm_topk": 4,
}
"""A configuration of the paper's code with every kind of layer, whose tokens see more than one chunk of memory."""


def small_decoder(config: dict[str, Any], reset: Reset = "carry") -> Decoder:
    """Our decoder of a configuration, in float64."""
    ours, vocab_size = decoder_config(config)
    ours = dataclasses.replace(ours, memory=dataclasses.replace(ours.memory, reset=reset))
    return Decoder(ours, vocab_size, TorchBackend(ours.initial_std), seed=0, fast_dtype=torch.float64).double()


def export(folder: Path, config: dict[str, Any], weights: dict[str, Tensor] | None = None) -> Path:
    """Write config.json, model.safetensors and the model files; without weights those of a new model."""
    folder.mkdir(parents=True, exist_ok=True)
    if weights is None:
        weights = official_weights(small_decoder(config))
    contents = config | {"model_type": "fwpkm", "architectures": ["FwPKMForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(contents))
    contiguous = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    for name in ("configuration_fwpkm.py", "modeling_fwpkm.py"):
        shutil.copy(MODEL_FILES / name, folder / name)
    return folder
