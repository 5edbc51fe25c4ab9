"""Files of fast state: safetensors with a description and a checksum; whole or absent, never half.

Layout: the tensors "keys" and "table", and metadata strings: `format`, `description` (JSON: configuration, running
scale, version), `user` (JSON) and `checksum` (BLAKE2b over the names, dtypes, shapes and bytes of the tensors and
over the description).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "fwpkm-fast-state/1"


class StateFileError(ValueError):
    """A fast-state file can't be used; the message names the file, what is wrong and what to do."""


def _checksum(tensors: dict[str, Tensor], description: str) -> str:
    digest = hashlib.blake2b(description.encode(), digest_size=32)
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
    text = json.dumps(description, sort_keys=True)
    metadata = {
        "format": FORMAT,
        "description": text,
        "user": json.dumps(user, sort_keys=True),
        "checksum": _checksum(tensors, text),
    }
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


def read_state_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Read and verify a file. Returns (tensors, description, user metadata).

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
    if _checksum(tensors, metadata.get("description", "")) != metadata.get("checksum"):
        raise StateFileError(
            f"the checksum of the fast-state file {path} does not match: damaged; use another checkpoint"
        )
    return tensors, json.loads(metadata["description"]), json.loads(metadata.get("user", "{}"))


def check_state_shapes(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise StateFileError when a file's tensors have other shapes or dtypes than the state that wants them."""
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise StateFileError(
                f"{path} holds {name} of shape {tuple(found[name].shape)} ({found[name].dtype}), but this memory has "
                f"{tuple(tensor.shape)} ({tensor.dtype}); n_subkeys, heads, k_dim, v_dim must be those of the run "
                "that wrote the file"
            )
