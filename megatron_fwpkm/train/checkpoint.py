"""Checkpoints of a whole job: complete under their own name, or not there.

    <run>/checkpoints/
        latest                         name of the newest complete checkpoint
        step_00000200/
            slow/                      DeepSpeed: weights, optimizer shards
            fast_state/replica_00000/block_001.safetensors, or block_001.shard_00000_of_00002.safetensors of each rank
            random/rank_00000.pt       random number generators
            <part>/                    whatever else has state of its own
            job.json                   step, tokens, data cursor, corpus, layout
            manifest.json              size and SHA-256 of every other file, written last
        damaged_step_00000100/         one that was found damaged and not used

A checkpoint is written into `.step_00000200.partial`, forced to disk and renamed; `latest` follows last. It is complete
when it has a manifest, and loaded only when its files are those of the manifest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_fwpkm.config import differing_keys
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.files import strict_json, sync_path, write_atomically
from megatron_fwpkm.memory.pkm_layer import named_slow_weights
from megatron_fwpkm.model.decoder import BlockStack
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors, on_leader
from megatron_fwpkm.phase import PHASE
from megatron_fwpkm.train.checkpoint_files import JOB_FILE, MANIFEST_FILE, damage, describe_files
from megatron_fwpkm.train.checkpoint_parts import CheckpointPart, FastStates, RandomGenerators, SlowWeights

FORMAT_VERSION = 2
_NAME = re.compile(r"step_(\d{8})")
_ONE_RANK = {"tensor": 1, "pipeline": 1, "memory_ranks": 1, "memory_sharding": "slots"}


@dataclass(frozen=True)
class JobState:
    """Where a job stands at an optimizer boundary."""

    step: int
    tokens: int
    skipped_steps: int
    first_loss: float | None
    recent_losses: list[float]
    data_cursor: dict[str, Any]
    corpus: dict[str, str]
    """Hashes of the corpus and tokenizer that the run reads."""
    world_size: int
    layout: dict[str, Any] = field(default_factory=lambda: dict(_ONE_RANK))
    """How the ranks of a replica divide model and memories: a checkpoint is of one layout."""
    skipped_in_a_row: int = 0
    """Steps skipped just before; without them a run that has diverged would have all its tries again at each start."""
    format_version: int = FORMAT_VERSION


def layout_of(topology: Topology) -> dict[str, Any]:
    """How the ranks of a replica divide model and memories."""
    place = topology.placement
    return {
        "tensor": topology.tensor_ranks,
        "pipeline": topology.stages,
        "memory_ranks": place.memory_ranks,
        "memory_sharding": place.sharding,
    }


class CheckpointStore:
    """The checkpoints folder of one run. All ranks call save() and load() together.

    `parts` are owners of further state; each gets a folder of its name.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        topology: Topology,
        engine: Any,
        model: BlockStack,
        parts: Mapping[str, CheckpointPart] | None = None,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._topology = topology
        self._model = model
        self._parts: dict[str, CheckpointPart] = {
            "slow": SlowWeights(engine),
            "fast_state": FastStates(model, topology),
            "random": RandomGenerators(topology),
            **(parts or {}),
        }

    def has_any(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return bool(self._names())

    def save(self, state: JobState) -> Path:
        """Write a checkpoint of this step unless there is one, point `latest` at it, drop the oldest.

        Raises SharedUserError when the disk is too full, RankFailedError for other errors; nothing half is left.
        """
        target = self._folder / f"step_{state.step:08d}"
        partial = self._folder / f".{target.name}.partial"
        with PHASE.during("preparing a checkpoint"):
            needed = self._estimated_bytes()
        exists = on_leader(lambda: self._clear_for(target, partial, needed), "preparing a checkpoint")
        if not exists:
            try:
                agree_on_errors(lambda: self._write(partial, state), "writing a checkpoint")
                description = describe_files(partial, self._topology)
                on_leader(lambda: _commit(partial, target, description), "writing a checkpoint")
            except Exception:
                if self._topology.is_leader:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        on_leader(lambda: self._point_at(target), "writing a checkpoint")
        return target

    def load(self, say: Callable[[str], None]) -> tuple[Path, JobState] | None:
        """Restore the newest whole checkpoint; returns it with the state that has no owner, or None if there is none.

        Newer ones that are damaged are renamed to damaged_<name>; `say` gets a line about each. Raises
        SharedUserError if there are checkpoints and none is whole, or the one found is of another layout.
        """
        names = on_leader(self._names, "looking for a checkpoint")
        damaged: dict[str, str] = {}
        for name in reversed(names):
            wrong = damage(self._folder / name, self._topology)
            if not wrong:
                break
            damaged[name] = f"{'; '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}"
        else:
            if not names:
                return None
            raise SharedUserError(
                f"no checkpoint in {self._folder} is whole: "
                + "; ".join(f"{name} ({text})" for name, text in damaged.items())
                + f". Restore their files, or delete {self._folder} to begin anew"
            )
        source = self._folder / name
        if damaged:
            for line in on_leader(lambda: self._set_aside(damaged, name), "setting damaged checkpoints aside"):
                say(line)
        return source, agree_on_errors(lambda: self._read(source), f"loading {source}")

    def _names(self) -> list[str]:
        """Everything with a checkpoint's name, oldest first, whole or not."""
        return sorted(path.name for path in self._folder.glob("step_*") if _NAME.fullmatch(path.name))

    def _set_aside(self, damaged: Mapping[str, str], whole: str) -> list[str]:
        write_atomically(self._folder / "latest", whole + "\n")
        lines = []
        for name, text in damaged.items():
            kept = self._folder / f"damaged_{name}"
            number = 1
            while kept.exists():
                number += 1
                kept = self._folder / f"damaged_{name}.{number}"
            os.rename(self._folder / name, kept)
            lines.append(f"checkpoint {name} is damaged ({text}): renamed to {kept.name}, going on from {whole}")
        return lines

    def _clear_for(self, target: Path, partial: Path, needed: int) -> bool:
        """Make room for a checkpoint; True if it is there already. Raises UserError when the disk is too full."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        if target.exists():
            return True
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise UserError(
                f"no space left for a checkpoint: the disk of {self._folder} has {free / 2**20:.1f} MiB free and one "
                f"takes about {needed / 2**20:.1f} MiB; free some and start the same command again: the checkpoints "
                f"that are there are whole"
            )
        for name in self._parts:
            (partial / name).mkdir(parents=True)
        return False

    def _write(self, partial: Path, state: JobState) -> None:
        for name, part in self._parts.items():
            part.save(partial / name)
        if self._topology.is_leader:
            (partial / JOB_FILE).write_text(json.dumps(asdict(state), indent=2, sort_keys=True) + "\n")

    def _point_at(self, target: Path) -> None:
        write_atomically(self._folder / "latest", target.name + "\n")
        whole = [name for name in self._names() if (self._folder / name / MANIFEST_FILE).is_file()]
        for name in whole[: -self._keep]:  # renamed first: half a checkpoint must not carry a checkpoint's name
            doomed = self._folder / f".{name}.partial"
            os.rename(self._folder / name, doomed)
            shutil.rmtree(doomed)

    def _read(self, source: Path) -> JobState:
        try:
            state = JobState(**json.loads((source / JOB_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read {source / JOB_FILE}: {error}; delete {source} to use an older one") from error
        if state.format_version != FORMAT_VERSION:
            raise UserError(f"{source} has format version {state.format_version}; this program reads {FORMAT_VERSION}")
        if state.world_size != self._topology.world_size:
            raise UserError(
                f"{source} was written by {state.world_size} processes and this job has {self._topology.world_size}; "
                f"start it with parallel.processes={state.world_size}"
            )
        own = layout_of(self._topology)
        if state.layout != own:
            raise UserError(
                f"{source} was written with another layout of the processes (then, now): "
                f"{'; '.join(differing_keys(state.layout, own))}. Start with the parallel section it was written with"
            )
        for name, part in self._parts.items():
            try:
                part.load(source / name)
            except Exception as error:
                raise UserError(
                    f"{source / name} can't be loaded ({error}); delete {source} to use an older one"
                ) from error
        return state

    def _estimated_bytes(self) -> int:
        """Upper estimate of a checkpoint: weights, fp32 copy and two moments, and every replica's fast state.

        All ranks call this together, since those of a pipeline's stages have unevenly much.
        """
        # With ZeRO-3 a parameter is empty and knows its size.
        weights = [weight for _, weight in named_slow_weights(self._model)]
        numbers = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
        fast = sum(state.num_bytes for _, state in self._model.fast_states())
        own = numbers * 16 // self._topology.replicas + fast
        every = [own]
        if self._topology.world_size > 1:
            every = every * self._topology.world_size
            dist.all_gather_object(every, own)
        return sum(every) + (1 << 20)


def _commit(partial: Path, target: Path, description: dict[str, dict[str, Any]]) -> None:
    write_atomically(partial / MANIFEST_FILE, strict_json(description, indent=1) + "\n")
    for folder in (path for path in partial.rglob("*") if path.is_dir()):
        sync_path(folder)
    os.rename(partial, target)
    sync_path(target.parent)
