"""Files of fast state: safetensors with a description and a checksum; whole or absent, never half.

Layout: the tensors "keys" and "table", and metadata strings: `format`, `description` (JSON: configuration, running
scale, version), `user` (JSON) and `checksum` (BLAKE2b over these strings and the names, dtypes, shapes and bytes of
the tensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "fwpkm-fast-state/1"


class StateFileError(ValueError):
    """A fast-state file can't be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class StateFile:
    """Content of a verified file."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    scale: float
    version: int
    user: dict[str, str]


def _checksum(tensors: dict[str, Tensor], description: str, user: str) -> str:
    digest = hashlib.blake2b(json.dumps([FORMAT, description, user]).encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_state_file(path: Path, tensors: dict[str, Tensor], description: dict[str, Any], user: dict[str, str]) -> None:
    """Write beside `path`, sync, rename. On any error the temporary file goes and `path` is as it was.

    Raises:
        StateFileError: the file could not be written (a full disk, a missing folder), naming the cause.
    """
    from safetensors.torch import save_file

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {"description": json.dumps(description, sort_keys=True), "user": json.dumps(user, sort_keys=True)}
    metadata = {"format": FORMAT, "checksum": _checksum(tensors, **texts), **texts}
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except Exception as error:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise StateFileError(
            f"could not write the fast state to {path} ({size / 2**20:.1f} MiB): {error}. Check that the folder exists "
            "and has room; what stood at that path before is unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_state_file(path: Path) -> StateFile:
    """Read and verify a file.

    Raises:
        StateFileError: the file is missing, not a fast-state file, truncated, or its checksum does not match.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise StateFileError(f"there is no fast-state file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise StateFileError(
            f"the fast-state file {path} is truncated or damaged ({error}); use another checkpoint"
        ) from error
    if metadata.get("format") != FORMAT or set(tensors) != {"keys", "table"}:
        raise StateFileError(f"{path} is not a fast-state file of format {FORMAT} (it says {metadata.get('format')!r})")
    texts = {name: metadata.get(name, "") for name in ("description", "user")}
    if _checksum(tensors, **texts) != metadata.get("checksum"):
        raise StateFileError(
            f"the checksum of the fast-state file {path} does not match its content: damaged; use another checkpoint"
        )
    try:
        description, user = (json.loads(text) for text in texts.values())
        scale, version = float.fromhex(description["scale"]), int(description["version"])
        config = dict(description["config"])
    except (KeyError, ValueError, TypeError) as error:
        raise StateFileError(f"the description in the fast-state file {path} can't be used: {error!r}") from error
    if not (math.isfinite(scale) and scale > 0):
        raise StateFileError(f"the fast-state file {path} has a running scale of {scale}; use another checkpoint")
    return StateFile(tensors, config, scale, version, user)


def check_fits(path: Path, found: StateFile, wanted: dict[str, Tensor], score_type: str) -> None:
    """Raise StateFileError when a file's tensors, or the scores that its keys were made for, are not those wanted."""
    for name, tensor in wanted.items():
        other = found.tensors[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise StateFileError(
                f"{path} holds {name} of shape {tuple(other.shape)} ({other.dtype}), but this memory has "
                f"{tuple(tensor.shape)} ({tensor.dtype}); n_subkeys, heads, k_dim, v_dim must be those of the run "
                "that wrote the file"
            )
    if found.config.get("score_type", score_type) != score_type:
        raise StateFileError(
            f"{path} was written with score_type {found.config['score_type']!r}, this memory has {score_type!r}: its "
            "sub-keys mean something else; use the configuration of the run that wrote the file"
        )
