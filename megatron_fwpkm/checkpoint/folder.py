"""The checkpoints folder of a run: what is in it, which are whole, which go.

    <run>/checkpoints/
        latest                         name of the newest complete checkpoint
        step_00000200/
            tensors/                   what torch.distributed.checkpoint writes: weights, moments, memories (parts.py)
            job.json                   step, tokens, data cursor, corpus, layout
            manifest.json              size and SHA-256 of every other file, written last
        damaged_step_00000100/         one that was found damaged and not used

A checkpoint is written into `.step_00000200.partial`, forced to disk and renamed; `latest` follows last. It is complete
when it has a manifest, and loaded only when its files are those of the manifest. One is deleted as it is made: renamed
to that name first.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_fwpkm.checkpoint.files import MANIFEST_FILE, TENSORS, damage
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.files import strict_json, sync_path, write_atomically
from megatron_fwpkm.parallel.topology import Topology, on_leader

_NAME = re.compile(r"step_\d{8}")
CHECKPOINTS = "checkpoints"
"""This folder, in a run directory."""
_LATEST = "latest"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint, whole or not."""
    return _NAME.fullmatch(name) is not None


def checkpoints_in(folder: Path) -> list[Path]:
    """Everything with a checkpoint's name, oldest first, whole or not."""
    return sorted(path for path in folder.glob("step_*") if is_checkpoint_name(path.name))


def is_complete(checkpoint: Path) -> bool:
    """Whether it has a manifest; its files are not looked at."""
    return (checkpoint / MANIFEST_FILE).is_file()


# -- writing and deleting, by one process ---------------------------------------------------------------------------


def partial_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written and deleted."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def remove_leftovers(folder: Path) -> None:
    """Delete what killed jobs have left half written or half deleted."""
    for leftover in folder.glob(".step_*.partial"):
        _delete(leftover)


def make_room(checkpoint: Path, needed: int) -> None:
    """Make the folder that a checkpoint is written into. Raises UserError when the disk is too full."""
    free = shutil.disk_usage(checkpoint.parent).free
    if free < needed:
        raise UserError(
            f"no space left for a checkpoint: the disk of {checkpoint.parent} has {free / 2**20:.1f} MiB free and one "
            f"takes about {needed / 2**20:.1f} MiB; free some and start the same command again: the checkpoints "
            f"that are there are whole"
        )
    (partial_of(checkpoint) / TENSORS).mkdir(parents=True)


def commit(checkpoint: Path, description: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of what `partial_of` has, and give it the checkpoint's name."""
    partial = partial_of(checkpoint)
    write_atomically(partial / MANIFEST_FILE, strict_json(description, indent=1) + "\n")
    for folder in (path for path in partial.rglob("*") if path.is_dir()):
        sync_path(folder)
    rename(partial, checkpoint)
    sync_path(checkpoint.parent)


def rename(before: Path, after: Path) -> None:
    """A checkpoint appears or disappears in this moment."""
    os.rename(before, after)


def point_at(checkpoint: Path) -> None:
    """Name the newest complete checkpoint."""
    write_atomically(checkpoint.with_name(_LATEST), checkpoint.name + "\n")


def remove_superfluous(folder: Path, keep_last_k: int, keep_every: int | None) -> None:
    """Delete complete checkpoints that are neither among the newest nor milestones."""
    for path in superfluous([path for path in checkpoints_in(folder) if is_complete(path)], keep_last_k, keep_every):
        remove_checkpoint(path)


def superfluous(checkpoints: Sequence[Path], keep_last_k: int, keep_every: int | None) -> list[Path]:
    """Those of complete checkpoints, oldest first, that are neither among the newest nor milestones."""
    return [
        path
        for path in checkpoints[:-keep_last_k]
        if not keep_every or int(path.name.removeprefix("step_")) % keep_every
    ]


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete one; renamed first: half a checkpoint must not carry a checkpoint's name."""
    doomed = partial_of(checkpoint)
    rename(checkpoint, doomed)
    _delete(doomed)


def _delete(partial: Path) -> None:
    shutil.rmtree(partial)


# -- finding one to load, by all ranks together ---------------------------------------------------------------------


def newest_whole(
    folder: Path, topology: Topology, say: Callable[[str], None], group: dist.ProcessGroup | None = None
) -> Path | None:
    """The newest checkpoint whose files are those of its manifest, or None where there is none at all.

    Newer ones that are damaged are renamed to damaged_<name>; `say` gets a line about each. Raises SharedUserError if
    there are checkpoints and none is whole.
    """
    found = on_leader(lambda: checkpoints_in(folder), "looking for a checkpoint", group)
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(found):
        wrong = damage(checkpoint, topology, group)
        if not wrong:
            break
        damaged[checkpoint] = f"{'; '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}"
    else:
        if not found:
            return None
        raise SharedUserError(
            f"no checkpoint in {folder} is whole: "
            + "; ".join(f"{path.name} ({text})" for path, text in damaged.items())
            + f". Restore their files, or delete {folder} to begin anew"
        )
    if damaged:
        for line in on_leader(lambda: _set_aside(damaged, checkpoint), "setting damaged checkpoints aside", group):
            say(line)
    return checkpoint


def check_whole(checkpoint: Path, topology: Topology, group: dist.ProcessGroup | None = None) -> None:
    """Raise SharedUserError on all ranks unless the files of a checkpoint are those of its manifest."""
    wrong = damage(checkpoint, topology, group)
    if wrong:
        raise SharedUserError(f"{checkpoint} is damaged ({'; '.join(wrong[:3])}); give another --checkpoint")


def _set_aside(damaged: Mapping[Path, str], whole: Path) -> list[str]:
    point_at(whole)
    lines = []
    for path, text in damaged.items():
        kept = path.with_name(f"damaged_{path.name}")
        number = 1
        while kept.exists():
            number += 1
            kept = path.with_name(f"damaged_{path.name}.{number}")
        rename(path, kept)
        lines.append(f"checkpoint {path.name} is damaged ({text}): renamed to {kept.name}, going on from {whole.name}")
    return lines
