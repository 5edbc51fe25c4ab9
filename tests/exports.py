"""Exported models as users load them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_fwpkm.compatibility import mend_torchvision


@dataclass(frozen=True)
class Exported:
    """What an exported folder holds."""

    model: Any
    tokenizer: Any
    """None where the folder has none."""


def load_exported(folder: Path, modules: Path, **options: Any) -> Exported:
    """Model, for evaluation, and tokenizer through the classes that users call; `modules` gets the model files."""
    mend_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules)):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return Exported(model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None)


@torch.no_grad()
def error_of_case(model: Any, path: Path) -> float:
    """Relative error of the logits of a golden model case, in the calls that the case was made with."""
    description = json.loads(path.with_suffix(".json").read_text())
    with np.load(path.with_suffix(".npz")) as file:
        arrays = {name: torch.from_numpy(file[name].copy()) for name in file.files}
    ids_BT, wanted = arrays["input_ids"].long(), arrays["logits"].double()
    mask, positions = arrays.get("attention_mask"), arrays.get("position_ids")
    length, prefill = ids_BT.shape[1], description["case"].get("prefill")
    cache = model.make_cache(len(ids_BT)) if prefill else None
    logits, start = [], 0
    for size in [prefill] + [1] * (length - prefill) if prefill else [length]:
        stop = start + size
        output = model(
            ids_BT[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if positions is None else positions[:, start:stop].long(),
            past_key_values=cache,
        )
        logits.append(output.logits)
        start = stop
    is_real = torch.ones_like(ids_BT, dtype=torch.bool) if mask is None else mask > 0
    found, wanted = torch.cat(logits, 1)[is_real], wanted[is_real]
    return float((found - wanted).norm() / wanted.norm())
