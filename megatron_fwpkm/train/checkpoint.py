"""Checkpoints of a whole job: complete under their own name, or not there.

    <run>/checkpoints/
        latest                         name of the newest complete checkpoint
        step_00000200/
            slow/                      DeepSpeed: weights, optimizer shards
            fast_state/replica_00000/block_001.safetensors
            random/rank_00000.pt       random number generators
            job.json                   step, tokens, data cursor, corpus, layout
            manifest.json              size and SHA-256 of every other file, written last

A checkpoint is written into `.step_00000200.partial`, forced to disk and renamed; `latest` follows last. It is complete
when it has a manifest, and loaded only when its files are those of the manifest.
"""

from __future__ import annotations

import hashlib
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

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
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
    corpus: dict[str, str]
    """Hashes of the corpus and tokenizer that the run reads."""
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
            if _NAME.fullmatch(named.name) and (named / MANIFEST_FILE).is_file():
                return named
        complete = self._complete()
        return complete[-1] if complete else None

    def save(self, engine: Any, model: Decoder, state: JobState) -> Path:
        """Write a checkpoint of this step unless there is one, point `latest` at it, drop the oldest."""
        target = self._folder / f"step_{state.step:08d}"
        partial = self._folder / f".{target.name}.partial"
        exists = self._on_leader(lambda: self._clear_for(target, partial, model), "preparing a checkpoint")
        if not exists:
            try:
                agree_on_errors(lambda: self._write(partial, engine, model, state), "writing a checkpoint")
            except Exception:
                if self._topology.is_leader:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        self._on_leader(lambda: self._publish(partial, target, state), "publishing a checkpoint")
        return target

    def load(self, source: Path, engine: Any, model: Decoder) -> JobState:
        """Restore slow weights, optimizer, fast state and random generators; returns the rest.

        Raises UserError if the checkpoint is damaged or of another layout.
        """
        self._on_leader(lambda: _verify(source), f"verifying {source}")
        return agree_on_errors(lambda: self._read(source, engine, model), f"loading {source}")

    def _complete(self) -> list[Path]:
        return sorted(
            path
            for path in self._folder.glob("step_*")
            if _NAME.fullmatch(path.name) and (path / MANIFEST_FILE).is_file()
        )

    def _on_leader(self, action: Callable[[], bool], what: str) -> bool:
        """Run `action` on rank 0; every rank gets its answer, or raises if it failed."""
        answer = agree_on_errors(lambda: action() if self._topology.is_leader else False, what)
        shared = [answer]
        torch.distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def _clear_for(self, target: Path, partial: Path, model: Decoder) -> bool:
        """Make room for a checkpoint; True if it is there already. Raises UserError when the disk is too full."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        if (target / MANIFEST_FILE).is_file():
            return True
        if target.exists():  # the rest of one that was being deleted
            shutil.rmtree(target)
        needed = _estimated_bytes(model, self._topology.world_size)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise UserError(
                f"the disk of {self._folder} has {free / 2**20:.0f} MiB free and a checkpoint takes about "
                f"{needed / 2**20:.0f} MiB; free some space and start again: the checkpoints that are there are whole"
            )
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
            (partial / MANIFEST_FILE).write_text(json.dumps(_describe_files(partial), indent=1) + "\n")
            sync_tree(partial)
            os.rename(partial, target)
            sync_path(self._folder)
        write_atomically(self._folder / "latest", target.name + "\n")
        for old in self._complete()[: -self._keep]:
            if old != target:  # renamed first: half a checkpoint must not carry a checkpoint's name
                doomed = old.with_name(f".{old.name}.partial")
                os.rename(old, doomed)
                shutil.rmtree(doomed)
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
        try:
            loaded, _ = engine.load_checkpoint(str(source), tag=_SLOW_TAG)
            if loaded is None:
                raise ValueError("DeepSpeed found no weights in it")
            for index, fast_state in model.fast_states():
                fast_state.load(source / self._fast_state_file(index))
            generators = torch.load(source / self._random_file(), weights_only=True)
            torch.set_rng_state(generators["torch"])
            random.setstate(_as_tuples(generators["python"]))
        except Exception as error:
            raise UserError(f"{source} can't be loaded ({error}); delete it to use an older one") from error
        return state

    def _fast_state_file(self, index: int) -> Path:
        return Path("fast_state", f"replica_{self._topology.replica:05d}", f"block_{index:03d}.safetensors")

    def _random_file(self) -> Path:
        return Path("random", f"rank_{self._topology.rank:05d}.pt")


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder but the manifest."""
    described = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return described


def _verify(source: Path) -> bool:
    """Raise UserError unless the files of a checkpoint are those of its manifest."""
    try:
        wanted = json.loads((source / MANIFEST_FILE).read_text())
        found = _describe_files(source)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {source}: {error}; delete it to use an older one") from error
    damaged = sorted(name for name in wanted if found.get(name) != wanted[name])
    if damaged:
        raise UserError(f"{source} is damaged ({', '.join(damaged[:3])}); delete it to use an older one")
    return True


def _estimated_bytes(model: Decoder, replicas: int) -> int:
    """Upper estimate of a checkpoint: weights, fp32 copy and two moments, and every replica's fast state."""
    slow = sum(parameter.numel() for parameter in model.parameters()) * 16
    return slow + replicas * sum(state.num_bytes for _, state in model.fast_states()) + (1 << 20)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value
