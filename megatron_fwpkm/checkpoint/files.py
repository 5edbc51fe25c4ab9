"""The files of a checkpoint: their sizes and hashes, and what is wrong with them. All ranks share the work."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.files import sync_path
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors, on_leader

MANIFEST_FILE = "manifest.json"
JOB_FILE = "job.json"
TENSORS = "tensors"
"""Folder that torch.distributed.checkpoint writes."""
_FILE_OF_RANK = re.compile(rf"{TENSORS}/__(\d+)_\d+\.distcp")


def describe_files(
    folder: Path, topology: Topology, group: torch.distributed.ProcessGroup | None = None
) -> dict[str, dict[str, Any]]:
    """Force every file of a folder to the disk and return its size and SHA-256, on all ranks.

    Call it when all ranks have written. Each rank describes what it has written itself, rank 0 also what is no rank's:
    on a shared disk another machine's files may be seen late. Raises, on all ranks, RankFailedError when a file is
    missing that the index of the tensors names.
    """
    what = "writing a checkpoint"
    own = agree_on_errors(
        lambda: describe_files_alone(folder, lambda name: _written_by(name) == topology.rank), what, group
    )
    found = {name: entry for part in _of_all_ranks(own, topology, group) for name, entry in part.items()}

    def check() -> None:
        lost = {f"{TENSORS}/{name}" for name in SavedTensors(folder / TENSORS).files} - found.keys()
        if lost:
            raise FileNotFoundError(f"{sorted(lost)[0]} was written and is not there")

    on_leader(check, what, group)
    return found


def _written_by(name: str) -> int:
    """The rank that wrote a file of a checkpoint, by the name that torch.distributed.checkpoint gives it."""
    match = _FILE_OF_RANK.fullmatch(name)
    return int(match[1]) if match else 0


def describe_files_alone(folder: Path, chosen: Callable[[str], bool] = lambda name: True) -> dict[str, dict[str, Any]]:
    """As `describe_files`, by this process alone; the chosen ones, by their names in the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if chosen(name):
            sync_path(path)
            found[name] = _describe(path)
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


def damage(folder: Path, topology: Topology, group: torch.distributed.ProcessGroup | None = None) -> list[str]:
    """What is wrong with a checkpoint, one phrase for each damaged file; the same on all ranks, empty if whole."""
    wanted, own = read_manifest(folder)
    # What one rank can't read none goes on with: the shares below come from the manifest.
    for phrases in _of_all_ranks(own, topology, group):
        if phrases:
            return phrases
    mine = shares({name: size_in_manifest(entry) for name, entry in wanted.items()}, topology.world_size)[topology.rank]

    def compare() -> dict[str, str | None]:
        return {name: compare_file(folder, name, wanted[name]) for name in mine}

    parts = _of_all_ranks(agree_on_errors(compare, "verifying", group), topology, group)
    return [phrase for _, phrase in sorted(item for part in parts for item in part.items()) if phrase]


def shares(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Names for each rank, so that all have about as many bytes; the same wherever it is called."""
    found: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        found[rank].append(name)
        load[rank] += sizes[name]
    return found


def _of_all_ranks(own: Any, topology: Topology, group: torch.distributed.ProcessGroup | None) -> list[Any]:
    parts = [own] * topology.world_size
    torch.distributed.all_gather_object(parts, own, group=group)
    return parts


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
