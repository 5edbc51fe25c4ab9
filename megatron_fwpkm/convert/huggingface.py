"""A model as a folder for transformers, which loads it without this library, and such a folder as a model again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_fwpkm.compatibility import mend_torchvision
from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.convert.begin_run import TOKENIZER_FILE
from megatron_fwpkm.convert.folder import new_folder
from megatron_fwpkm.convert.model_card import model_card
from megatron_fwpkm.convert.official_config import exported_config, official_config
from megatron_fwpkm.convert.official_names import official_weights
from megatron_fwpkm.convert.source import WholeModel, model_of_files
from megatron_fwpkm.convert.weight_files import write_weights
from megatron_fwpkm.data.tokenizer import CorpusTokenizer
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import strict_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

CONFIG_FILE = "config.json"
TRAINING_FILE = "training_config.yaml"
MODEL_FILES = ("configuration_fwpkm.py", "modeling_fwpkm.py")
_OF_THE_MACHINE: Mapping[str, set[str]] = {
    "data": {"directory", "corpus", "cache", "path", "tokenizer", "processes", "workers"}
}
"""Settings of a run that say where things are, not what was trained."""
_MOST_SUPPRESSED = 4096


def export_model(
    model: WholeModel,
    target: Path,
    tokenizer: CorpusTokenizer | None,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)` loads.

    Weights have the official names; the fast state is among them, in float32 whatever `dtype` the others have. Raises
    UserError if something is at the target, or it can't be written; nothing is there then.
    """
    weights = _cast(official_weights(model.decoder), dtype)
    with new_folder(target) as folder:
        write_weights(folder, weights, max_shard_size, advance)
        (folder / CONFIG_FILE).write_text(strict_json(_config(model, tokenizer, dtype), indent=2) + "\n")
        generation_config(model.vocab_size, tokenizer).save_pretrained(folder)
        if tokenizer is not None:
            _tokenizer(tokenizer, model.max_positions).save_pretrained(folder)
            tokenizer.tokenizer.save(str(folder / TOKENIZER_FILE))  # as it was trained with, byte by byte
        for name in MODEL_FILES:
            (folder / name).write_text(model_file(name))
        if model.run is not None:
            (folder / TRAINING_FILE).write_text(training_settings(model.run.config))
        (folder / "README.md").write_text(model_card(model, tokenizer, dtype))


def export_official(
    model: WholeModel, target: Path, max_shard_size: str, advance: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Write a folder with config.json and weights as the paper's code reads them. Raises UserError as export_model."""
    config = official_config(model.config, model.vocab_size, model.max_positions)
    with new_folder(target) as folder:
        write_weights(folder, official_weights(model.decoder), max_shard_size, advance)
        (folder / CONFIG_FILE).write_text(strict_json(config, indent=2) + "\n")


def read_exported(folder: Path) -> WholeModel:
    """The model of an exported folder. Raises UserError that lists what is missing or unknown."""
    return model_of_files(folder, read_config(folder / CONFIG_FILE))


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises UserError if it can't be read."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); give the config.json that belongs to the weights") from error
    return content


def model_file(name: str) -> str:
    """One of the files with which transformers runs the model."""
    return (resources.files("megatron_fwpkm.convert.hf_model") / name).read_text()


def training_settings(config: TrainConfig) -> str:
    """What a run was trained with, as YAML, without its model, which config.json has, and without places."""
    import yaml

    content = config.model_dump(
        mode="json", exclude={"model": True, "run_directory": True, "parallel": True, **_OF_THE_MACHINE}
    )
    return str(yaml.safe_dump(content, sort_keys=False))


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor if ".fwpkm." in name else tensor.to(dtype) for name, tensor in weights.items()}


def _config(model: WholeModel, tokenizer: CorpusTokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    mend_torchvision()
    from megatron_fwpkm.convert.hf_model.configuration_fwpkm import AUTO_MAP

    end = None if tokenizer is None else tokenizer.end_id
    return {
        "architectures": ["FwPKMForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
        **exported_config(model.config, model.vocab_size, model.max_positions),
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def generation_config(vocab_size: int, tokenizer: CorpusTokenizer | None) -> GenerationConfig:
    """Greedy, to the end of a document; rows of the embedding that are no token are never generated."""
    mend_torchvision()
    from transformers import GenerationConfig

    if tokenizer is None:
        return GenerationConfig()
    unused = list(range(tokenizer.vocab_size, vocab_size))
    suppressed = unused if 0 < len(unused) <= _MOST_SUPPRESSED else None
    return GenerationConfig(eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.end_id, suppress_tokens=suppressed)


def _tokenizer(tokenizer: CorpusTokenizer, max_positions: int) -> PreTrainedTokenizerFast:
    """Adds no special tokens, as in training; pads left, as generation wants it."""
    mend_torchvision()
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.end_of_document
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_positions or int(1e30),
    )
