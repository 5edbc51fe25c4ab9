"""Checkpoints of a whole job: complete under their own name, or not there.

    <run>/checkpoints/
        latest                         name of the newest complete checkpoint
        step_00000200/
            slow/                      DeepSpeed: weights, optimizer shards
            fast_state/replica_00000/block_001.safetensors
            random/rank_00000.pt       random number generators
            job.json                   step, tokens, data cursor, layout

A checkpoint is written into `.step_00000200.partial`, forced to disk and renamed; `latest` follows last.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import sync_path, sync_tree, write_atomically
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8})")
_SLOW_TAG = "slow"


@dataclass(frozen=True)
class JobState:
    """Where a job stands at an optimizer boundary."""

    step: int
    tokens: int
    skipped_steps: int
    first_loss: float | None
    recent_losses: list[float]
    data_cursor: dict[str, Any]
    world_size: int
    format_version: int = FORMAT_VERSION


class CheckpointStore:
    """The checkpoints folder of one run. All ranks call save() and load() together."""

    def __init__(self, folder: Path, keep: int, topology: Topology) -> None:
        self._folder = folder
        self._keep = keep
        self._topology = topology

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        pointer = self._folder / "latest"
        if pointer.is_file():
            named = self._folder / pointer.read_text().strip()
            if _NAME.fullmatch(named.name) and (named / "job.json").is_file():
                return named
        complete = self._complete()
        return complete[-1] if complete else None

    def save(self, engine: Any, model: Decoder, state: JobState) -> Path:
        """Write a checkpoint of this step unless there is one, point `latest` at it, drop the oldest."""
        target = self._folder / f"step_{state.step:08d}"
        partial = self._folder / f".{target.name}.partial"
        exists = self._on_leader(lambda: self._clear_for(target, partial), "preparing a checkpoint")
        if not exists:
            agree_on_errors(lambda: self._write(partial, engine, model, state), "writing a checkpoint")
        self._on_leader(lambda: self._publish(partial, target, state), "publishing a checkpoint")
        return target

    def load(self, source: Path, engine: Any, model: Decoder) -> JobState:
        """Restore slow weights, optimizer, fast state and random generators; returns the rest.

        Raises UserError if the checkpoint is damaged or of another layout.
        """
        return agree_on_errors(lambda: self._read(source, engine, model), f"loading {source}")

    def _complete(self) -> list[Path]:
        return sorted(
            path for path in self._folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / "job.json").is_file()
        )

    def _on_leader(self, action: Callable[[], bool], what: str) -> bool:
        """Run `action` on rank 0; every rank gets its answer, or raises if it failed."""
        answer = agree_on_errors(lambda: action() if self._topology.is_leader else False, what)
        shared = [answer]
        torch.distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def _clear_for(self, target: Path, partial: Path) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        if (target / "job.json").is_file():
            return True
        partial.mkdir()
        return False

    def _write(self, partial: Path, engine: Any, model: Decoder, state: JobState) -> None:
        engine.save_checkpoint(str(partial), tag=_SLOW_TAG, save_latest=False)
        for index, fast_state in model.fast_states():
            path = partial / self._fast_state_file(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            fast_state.save(path)
        random_file = partial / self._random_file()
        random_file.parent.mkdir(exist_ok=True)
        torch.save({"torch": torch.get_rng_state(), "python": random.getstate()}, random_file)
        if self._topology.is_leader:
            (partial / "job.json").write_text(json.dumps(asdict(state), indent=2, sort_keys=True) + "\n")

    def _publish(self, partial: Path, target: Path, state: JobState) -> bool:
        if partial.exists():
            sync_tree(partial)
            os.rename(partial, target)
            sync_path(self._folder)
        write_atomically(self._folder / "latest", target.name + "\n")
        for old in self._complete()[: -self._keep]:
            if old != target:
                shutil.rmtree(old)
        return True

    def _read(self, source: Path, engine: Any, model: Decoder) -> JobState:
        try:
            state = JobState(**json.loads((source / "job.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"cannot read {source / 'job.json'}: {error}; delete {source} to use an older one"
            ) from error
        if state.format_version != FORMAT_VERSION:
            raise UserError(f"{source} has format version {state.format_version}; this program reads {FORMAT_VERSION}")
        if state.world_size != self._topology.world_size:
            raise UserError(
                f"{source} was written by {state.world_size} processes and this job has {self._topology.world_size}; "
                f"start it with parallel.processes={state.world_size}"
            )
        engine.load_checkpoint(str(source), tag=_SLOW_TAG)
        for index, fast_state in model.fast_states():
            fast_state.load(source / self._fast_state_file(index))
        generators = torch.load(source / self._random_file(), weights_only=True)
        torch.set_rng_state(generators["torch"])
        random.setstate(_as_tuples(generators["python"]))
        return state

    def _fast_state_file(self, index: int) -> Path:
        return Path("fast_state", f"replica_{self._topology.replica:05d}", f"block_{index:03d}.safetensors")

    def _random_file(self) -> Path:
        return Path("random", f"rank_{self._topology.rank:05d}.pt")


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value
