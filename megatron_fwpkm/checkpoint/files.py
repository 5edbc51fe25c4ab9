"""The files of a checkpoint: their sizes and hashes, and what is wrong with them. All ranks share the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_fwpkm.files import sync_path
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors

MANIFEST_FILE = "manifest.json"
JOB_FILE = "job.json"
TENSORS = "tensors"
"""Folder that torch.distributed.checkpoint writes."""


def describe_files(
    folder: Path, topology: Topology, group: torch.distributed.ProcessGroup | None = None
) -> dict[str, dict[str, Any]]:
    """Force every file of a folder to the disk and return its size and SHA-256, on all ranks.

    Call it when all ranks have written. Each rank reads its share of the files once.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def describe(name: str) -> dict[str, Any]:
        sync_path(folder / name)
        return _describe(folder / name)

    return dict(_shared(names, topology, lambda name: (name, describe(name)), "writing a checkpoint", group))


def describe_files_alone(folder: Path) -> dict[str, dict[str, Any]]:
    """As `describe_files`, by this process alone."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync_path(path)
        found[str(path.relative_to(folder))] = _describe(path)
    return found


def read_manifest(checkpoint: Path) -> tuple[dict[str, Any], list[str]]:
    """What each file of a checkpoint should be, and what is wrong with that list itself."""
    try:
        wanted = json.loads((checkpoint / MANIFEST_FILE).read_text())
        if not isinstance(wanted, dict) or JOB_FILE not in wanted:  # it would vouch for files that it doesn't name
            return {}, [f"{MANIFEST_FILE} is no list of a checkpoint's files"]
    except FileNotFoundError:
        return {}, [f"{MANIFEST_FILE} is missing"]
    except (OSError, ValueError) as error:
        return {}, [f"{MANIFEST_FILE} cannot be read: {error}"]
    return wanted, []


def damage(folder: Path, topology: Topology) -> list[str]:
    """What is wrong with a checkpoint, one phrase for each damaged file; the same on all ranks, empty if whole."""
    wanted, own = read_manifest(folder)
    # What one rank can't read none goes on with: the shares below come from the manifest.
    unreadable: list[list[str]] = [[] for _ in range(topology.world_size)]
    torch.distributed.all_gather_object(unreadable, own)
    found = next((phrases for phrases in unreadable if phrases), [])
    if found:
        return found
    phrases = _shared(sorted(wanted), topology, lambda name: compare_file(folder, name, wanted[name]), "verifying")
    return [phrase for phrase in phrases if phrase]


def _shared(
    names: Sequence[str],
    topology: Topology,
    action: Callable[[str], Any],
    what: str,
    group: torch.distributed.ProcessGroup | None = None,
) -> list[Any]:
    """Results of `action` for every name, each made on one rank."""
    own = agree_on_errors(lambda: [action(name) for name in names[topology.rank :: topology.world_size]], what, group)
    parts: list[list[Any]] = [[] for _ in range(topology.world_size)]
    torch.distributed.all_gather_object(parts, own, group=group)
    return [item for part in parts for item in part]


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def damage_seen_alone(
    checkpoint: Path, *, read: bool = True, advance: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """As `damage`, by this process alone; without `read` by the files' sizes only. `advance` gets bytes looked at."""
    wanted, phrases = read_manifest(checkpoint)
    for name, entry in sorted(wanted.items()):
        phrases += [phrase for phrase in [compare_file(checkpoint, name, entry, read=read)] if phrase]
        advance(size_in_manifest(entry))
    return phrases


def size_in_manifest(entry: Any) -> int:
    """Bytes that a file should have; 0 where the entry is damaged."""
    return entry["bytes"] if isinstance(entry, dict) and isinstance(entry.get("bytes"), int) else 0


def compare_file(folder: Path, name: str, wanted: Any, *, read: bool = True) -> str | None:
    """What is wrong with one file of a checkpoint, by its entry in the manifest; None if it is whole."""
    path = folder / name
    try:
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {wanted['bytes']:,}"
        if read and _describe(path) != wanted:
            return f"the content of {name} doesn't match its hash"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, KeyError, TypeError) as error:
        return f"{name} cannot be read: {error}"
    return None
