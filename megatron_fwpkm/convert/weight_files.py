"""Files of weights by name: safetensors and pickles, whole or in parts; pickles are read without running their code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fwpkm.errors import UserError

_INDEX = ".index.json"
_NAMES = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
    "mp_rank_00_model_states.pt",
)
"""What a folder is searched for, in this order."""
_PICKLES = (".bin", ".pt", ".pth")
_INSIDE = ("module", "state_dict", "model")
"""Keys under which a file of a training job has its weights; DeepSpeed's is the first."""
_WRAPPERS = ("module.", "_orig_mod.")
"""Beginnings that all names have where a wrapped model was saved."""


def read_weights(place: Path) -> dict[str, Tensor]:
    """The weights in a file, or in the folder of a model, by name.

    Files are safetensors, `pytorch_model.bin`, the index of several of either, or DeepSpeed's
    `mp_rank_00_model_states.pt` of a job without tensor parallelism. Raises UserError where there are none, or they
    can't be read.
    """
    path = _find(place)
    try:
        weights = _read_parts(path) if path.name.endswith(_INDEX) else _read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise UserError(
            f"cannot read weights from {path} ({type(error).__name__}: {error}); give an intact file"
        ) from error
    wrong = sorted(name for name, value in weights.items() if not isinstance(value, Tensor))
    if wrong or not weights:
        raise UserError(f"{path} holds no weights by name{f' ({wrong[0]!r} is none)' if wrong else ''}")
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
    return weights


def _find(place: Path) -> Path:
    if place.is_file():
        return place
    found = [place / name for name in _NAMES if (place / name).is_file()]
    if not found:
        what = f"none of {', '.join(_NAMES)} is in it" if place.is_dir() else "it is not there"
        raise UserError(f"{place} has no weights: {what}")
    return found[0]


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The files that an index names; every name must be in the file that the index says, and nothing else in any."""
    names: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    weights: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise ValueError(f"{file!r} is no file beside the index")
        part = _read(index.parent / file)
        wanted = {name for name, where in names.items() if where == file}
        if part.keys() != wanted:
            raise ValueError(f"{file} and the index differ in {sorted(part.keys() ^ wanted)[:3]}")
        weights |= part
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if path.suffix not in _PICKLES:
        raise UserError(f"{path} is of no known kind; known are .safetensors, {', '.join(_PICKLES)}")
    return _read_pickle(path)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    others = sorted(path.parent.glob("mp_rank_0[1-9]*_model_states.pt")) if path.name.startswith("mp_rank_00") else []
    if others:
        raise UserError(
            f"{path} is one part of several ({others[0].name} is beside it): only jobs without tensor parallelism can "
            "be read; save the whole model with the program that trained it"
        )
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} holds more than tensors, and loading that could run its code, so it is refused ({reason}). If you "
            "trust the file, save its weights as safetensors with the program that wrote it"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of weights by name")
    for key in _INSIDE:
        if isinstance(content.get(key), dict):
            inner: dict[str, Tensor] = content[key]
            if not inner:
                raise ValueError(f"its {key!r} is empty; of a ZeRO-3 job, make a whole file with zero_to_fp32.py first")
            return inner
    return content


def _is_archive(path: Path) -> bool:
    """Whether torch can map it into memory: it is of the format of torch 1.6 and later."""
    import zipfile

    return zipfile.is_zipfile(path)


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], max_shard_size: str, advance: Callable[[int], None]
) -> None:
    """Write safetensors as transformers lays them out: `model.safetensors`, or parts of at most that size and an index.

    `advance` gets the bytes written. Raises UserError for a size that is none.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    own = {name: tensor.detach().contiguous() for name, tensor in sorted(weights.items())}
    try:
        if max_shard_size.strip().startswith("-"):
            raise ValueError("below 0")
        split = split_torch_state_dict_into_shards(own, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"max-shard-size is {max_shard_size!r}; give something like 5GB or 500MB") from error
    for file, names in split.filename_to_tensors.items():
        part = {name: own[name] for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library lets nobody else read it
        advance(sum(tensor.nbytes for tensor in part.values()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"model.safetensors{_INDEX}").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
