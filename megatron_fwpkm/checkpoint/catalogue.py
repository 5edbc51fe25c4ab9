"""The checkpoints of a run as one process sees them: which there are, what is in them, whether they are whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_fwpkm.checkpoint.files import TENSORS, damage_seen_alone, read_manifest, size_in_manifest
from megatron_fwpkm.checkpoint.folder import (
    CHECKPOINTS,
    checkpoints_in,
    is_checkpoint_name,
    is_complete,
    remove_checkpoint,
    superfluous,
)
from megatron_fwpkm.checkpoint.store import JobState, read_state
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.errors import UserError


def find_checkpoints(place: Path) -> list[Path]:
    """The checkpoints of a run directory or of its checkpoints folder, oldest first, whole or not; or the one given.

    Raises UserError if there is none.
    """
    found = _find(place)
    if not found:
        raise UserError(f"{place} is no checkpoint and has none; give a run directory or one of its checkpoints/step_*")
    return found


def _find(place: Path) -> list[Path]:
    if is_checkpoint_name(place.name) or is_complete(place):
        return [place] if place.is_dir() else []
    return checkpoints_in(place / CHECKPOINTS if (place / CHECKPOINTS).is_dir() else place)


def choose_checkpoint(place: Path, name: str | None = None) -> Path:
    """The named or newest complete checkpoint of a run, or the one given. Raises UserError if there is none."""
    complete = [path for path in _find(place) if is_complete(path)]
    if not complete:
        raise UserError(f"{place} has no complete checkpoint; train for at least checkpoint.every steps")
    if name is None:
        return complete[-1]
    chosen = [path for path in complete if path.name == name]
    if not chosen:
        raise UserError(f"{place} has no complete checkpoint {name!r}; there are {', '.join(p.name for p in complete)}")
    return chosen[0]


def verify(checkpoint: Path) -> None:
    """Raise UserError unless the files of a checkpoint are those of its manifest."""
    wrong = damage_seen_alone(checkpoint)
    if wrong:
        raise UserError(
            f"{checkpoint} is damaged ({'; '.join(wrong[:3])}); give another --checkpoint, or train again from there"
        )


@dataclass(frozen=True)
class Group:
    """Tensors of a checkpoint of one kind."""

    name: str
    tensors: int
    numbers: int
    num_bytes: int


@dataclass(frozen=True)
class Description:
    """What a checkpoint is, by its small files and the sizes of the large ones."""

    path: Path
    state: JobState | None
    """None where job.json can't be read."""
    num_bytes: int
    wrong: list[str]
    """What the sizes of files show; their content is not read."""


def describe(checkpoint: Path) -> Description:
    """A checkpoint, whole or not."""
    wrong = damage_seen_alone(checkpoint, read=False)
    state = None
    try:
        state = read_state(checkpoint)
    except UserError as error:
        wrong = wrong or [str(error)]
    wanted, _ = read_manifest(checkpoint)
    return Description(checkpoint, state, sum(size_in_manifest(entry) for entry in wanted.values()), wrong)


def describe_tensors(checkpoint: Path) -> list[Group]:
    """The tensors of a whole checkpoint by the first word of their names. Raises UserError if they can't be read."""
    groups: dict[str, list[tuple[int, int]]] = {}
    try:
        descriptions = SavedTensors(checkpoint / TENSORS).descriptions
    except ValueError as error:
        raise UserError(f"{error}; `launch/checkpoint.py verify` tells what is damaged") from error
    for name, tensor in descriptions.items():
        numbers = tensor.shape.numel()
        groups.setdefault(name.split("/")[0], []).append((numbers, numbers * tensor.dtype.itemsize))
    return [
        Group(name, len(sizes), sum(numbers for numbers, _ in sizes), sum(num_bytes for _, num_bytes in sizes))
        for name, sizes in groups.items()
    ]


def describe_layout(state: JobState) -> str:
    """Like "TP2 PP1 DP2 ZeRO-1, memories over 2 ranks (slots)"."""
    layout = state.layout
    if not layout:
        return "unknown"
    ranks = layout["memory_ranks"]
    spread = f", memories over {ranks} ranks ({layout['memory_sharding']})" if ranks > 1 else ""
    sequence = " SP" if layout["sequence_parallel"] else ""
    parts = f"TP{layout['tensor']}{sequence} PP{layout['pipeline']} DP{layout['replicas']} ZeRO-{layout['zero_stage']}"
    return parts + spread


def prune(place: Path, keep_last_k: int, keep_every: int | None, *, dry_run: bool = False) -> list[Path]:
    """Delete superfluous checkpoints of a run; returns them. Call it while no job runs there.

    Those that are kept are read: damaged ones don't count, and stay.
    """
    older, whole = find_checkpoints(place), list[Path]()
    while older and len(whole) < keep_last_k:
        newest = older.pop()
        if not damage_seen_alone(newest):
            whole.append(newest)
    complete = [path for path in older if is_complete(path)]
    doomed = superfluous([*complete, *whole], len(whole), keep_every) if whole else []
    if not dry_run:
        for path in doomed:
            remove_checkpoint(path)
    return doomed
