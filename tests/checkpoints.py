"""What tests ask of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_fwpkm.checkpoint.files import TENSORS
from megatron_fwpkm.checkpoint.tensors import SavedTensors


def whole_tensors(checkpoint: Path, *prefixes: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint whose name begins so, the random generators of ranks left out."""
    source = SavedTensors(checkpoint / TENSORS)
    names = [name for name in source.descriptions if not name.startswith("random/")]
    return {name: source.whole(name) for name in names if not prefixes or name.startswith(prefixes)}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of what only one side has, or what is not the same bit by bit."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )
