"""Checkpoints of a whole job: complete under their own name, or not there.

    <run>/checkpoints/
        latest                         name of the newest complete checkpoint
        step_00000200/
            tensors/                   what torch.distributed.checkpoint writes: weights, moments, memories (parts.py)
            job.json                   step, tokens, data cursor, corpus, layout
            manifest.json              size and SHA-256 of every other file, written last
        damaged_step_00000100/         one that was found damaged and not used

A checkpoint is written into `.step_00000200.partial`, forced to disk and renamed; `latest` follows last. It is complete
when it has a manifest, and loaded only when its files are those of the manifest. It belongs to no layout: any number of
processes laid out in any way reads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_fwpkm.checkpoint.files import (
    JOB_FILE,
    MANIFEST_FILE,
    TENSORS,
    damage,
    describe_files,
    describe_files_alone,
)
from megatron_fwpkm.checkpoint.parts import CheckpointPart
from megatron_fwpkm.checkpoint.pieces import Pieces, Staging
from megatron_fwpkm.checkpoint.tensors import SavedTensors, save_tensors
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.files import strict_json, sync_path, write_atomically
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors, on_leader
from megatron_fwpkm.phase import PHASE

FORMAT_VERSION = 3
_NAME = re.compile(r"step_(\d{8})")
_ENTRY_BYTES = 2048
"""Upper estimate of what a file needs for one piece beside its numbers."""


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
    """Hashes of the corpus and tokenizer that the run reads; those that it may not choose, where it has not begun."""
    layout: dict[str, Any]
    """How the ranks divided the work: for the reader, and the number of sequences that a step must go on with; empty
    where no job has written it."""
    skipped_in_a_row: int = 0
    """Steps skipped just before; without them a run that has diverged would have all its tries again at each start."""
    format_version: int = FORMAT_VERSION


def layout_of(topology: Topology, zero_stage: int, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
    """How ranks divide model, memories and batches."""
    place = topology.placement
    return {
        "processes": topology.world_size,
        "tensor": topology.tensor_ranks,
        "sequence_parallel": place.sequence_parallel,
        "pipeline": topology.stages,
        "replicas": topology.replicas,
        "zero_stage": zero_stage,
        "memory_ranks": place.memory_ranks,
        "memory_sharding": place.sharding,
        "memories": topology.replicas // place.replicas,
        "microbatch": micro_batch_size * topology.replicas,
        "accumulation": accumulation,
    }


def check_batch(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Notes on a batch that is divided otherwise. Raises UserError where a step would have other sequences."""
    if not then:  # no job has written it
        return []
    sizes = [layout.get("microbatch", 0) * layout.get("accumulation", 0) for layout in (then, now)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"it was written by a job with {sizes[0]} sequences a step and this one has {sizes[1]} "
            f"(micro_batch_size x replicas x gradient_accumulation = {now['microbatch']} x {now['accumulation']}): set "
            f"training.micro_batch_size and training.gradient_accumulation so that it is {sizes[0]} again"
        )
    if then["microbatch"] == now["microbatch"]:
        return []
    return [
        f"a step's {sizes[0]} sequences come in microbatches of {now['microbatch']} instead of {then['microbatch']}: "
        "memories are written by each in turn, so this is not the same training to the last digit"
    ]


@dataclass(frozen=True)
class SaveReport:
    """How a checkpoint was written."""

    path: Path
    pause_seconds: float
    """For so long training waited."""
    seconds: float
    """From the beginning to the end of writing."""
    num_bytes: int
    """Of all files."""

    def __str__(self) -> str:
        size = self.num_bytes / 2**20
        speed = f"{size:.1f} MiB in {self.seconds:.1f} s, {size / max(self.seconds, 1e-9):.0f} MiB/s"
        waited = f"; training waited {self.pause_seconds:.2f} s" if self.pause_seconds < self.seconds else ""
        return f"saved {self.path} ({speed}{waited})"


class _Writing:
    """A save that goes on beside training."""

    def __init__(self, write: Callable[[], SaveReport]) -> None:
        self._write = write
        self._report: SaveReport | None = None
        self.error: BaseException | None = None
        self.failed_while = ""
        # A process that ends for another reason does not wait for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with PHASE.aside():
                self._report = self._write()
        except BaseException as error:
            self.failed_while = PHASE.of_thread()
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> SaveReport:
        """Its report, or its error."""
        with PHASE.during("waiting for a checkpoint to be written"):
            self._thread.join()
        if self.error is not None:
            with PHASE.during(self.failed_while):
                raise self.error
        assert self._report is not None
        return self._report


class CheckpointStore:
    """The checkpoints folder of one run. All ranks call its methods together, unless a method says otherwise.

    Args:
        folder: <run>/checkpoints
        topology: this rank among all
        parts: owners of state
        keep_last_k: newest whole checkpoints to keep
        keep_every: checkpoints of these steps (multiples) are kept for good; None: none
        asynchronous: whether `save` returns when the state is copied, and files are written beside training
        timeout_seconds: longest wait of that writing for another rank
    """

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        parts: Mapping[str, CheckpointPart],
        *,
        keep_last_k: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = False,
        timeout_seconds: float = 300.0,
    ) -> None:
        self._folder = folder
        self._topology = topology
        self._parts = dict(parts)
        self._keep_last_k, self._keep_every = keep_last_k, keep_every
        self._asynchronous = asynchronous
        # Exchanges of its own: training's go on in the default group.
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._staging = Staging()
        self._writing: _Writing | None = None
        self._reports: list[SaveReport] = []

    def has_any(self) -> bool:
        """Whether there is a checkpoint, whole or not. This rank alone."""
        return bool(self._names())

    @property
    def has_failed(self) -> bool:
        """Whether a save that goes on beside training has failed: `finish` raises why. This rank alone."""
        return self._writing is not None and self._writing.error is not None

    def take_reports(self) -> list[SaveReport]:
        """Of the saves that have ended since the last call. This rank alone."""
        if self._writing is not None and not self._writing.is_running and self._writing.error is None:
            self._reports.append(self._writing.wait())
            self._writing = None
        reports, self._reports = self._reports, []
        return reports

    def finish(self) -> None:
        """Wait for a save that goes on beside training. Raises what `save` does."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._reports.append(writing.wait())

    def save(self, state: JobState) -> Path:
        """Write a checkpoint of this step unless there is one, point `latest` at it, drop the oldest.

        Raises SharedUserError when the disk is too full, RankFailedError for other errors, of this or of the save
        before; nothing half is left.
        """
        started = time.perf_counter()
        self.finish()
        target = self._folder / f"step_{state.step:08d}"
        with PHASE.during("preparing a checkpoint"):
            if on_leader(lambda: self._clean(target), "preparing a checkpoint"):
                on_leader(lambda: self._point_at(target), "writing a checkpoint")
                return target
            pieces = agree_on_errors(self._pieces, "preparing a checkpoint")
            needed = _needed_bytes(pieces, self._topology.world_size)
            on_leader(lambda: self._make_room(target, needed), "preparing a checkpoint")
        pause = time.perf_counter() - started

        def write() -> SaveReport:
            num_bytes = self._write(target, state, pieces)
            seconds = time.perf_counter() - started
            return SaveReport(target, pause if self._asynchronous else seconds, seconds, num_bytes)

        if self._asynchronous:
            self._writing = _Writing(write)
        else:
            self._reports.append(write())
            self._staging.release()
        return target

    def _pieces(self) -> dict[str, Pieces]:
        pieces: dict[str, Pieces] = {}
        for part in self._parts.values():
            pieces |= part.pieces(self._staging)
        if not self._asynchronous:
            return pieces
        return {name: one.copied(name, self._staging) for name, one in pieces.items()}

    def _write(self, target: Path, state: JobState, pieces: dict[str, Pieces]) -> int:
        """Bytes of all files."""
        what, partial = "writing a checkpoint", _partial(target)
        try:
            agree_on_errors(lambda: save_tensors(partial / TENSORS, pieces, self._group), what, self._group)
            on_leader(lambda: _write_job(partial, state), what, self._group)
            description = describe_files(partial, self._topology, self._group)
            on_leader(lambda: _commit(partial, target, description), what, self._group)
        except Exception:
            if self._topology.is_leader:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        on_leader(lambda: self._point_at(target), what, self._group)
        return sum(entry["bytes"] for entry in description.values())

    def load_one(self, source: Path, say: Callable[[str], None]) -> JobState:
        """Restore one checkpoint of any run, and leave that as it is. Raises SharedUserError if it is damaged."""
        wrong = damage(source, self._topology)
        if wrong:
            raise SharedUserError(f"{source} is damaged ({'; '.join(wrong[:3])}); give another --checkpoint")
        return self._take_over(source, say, None)

    def load(
        self, say: Callable[[str], None], check: Callable[[JobState], list[str]] | None = None
    ) -> tuple[Path, JobState] | None:
        """Restore the newest whole checkpoint; returns its path and the state that has no owner, or None.

        Newer ones that are damaged are renamed to damaged_<name>; `say` gets a line about each, and what parts have to
        tell. `check` looks at the state before anything is taken over. Raises SharedUserError if there are checkpoints
        and none is whole, or the one found does not fit this job.
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
        return source, self._take_over(source, say, check)

    def _take_over(
        self, source: Path, say: Callable[[str], None], check: Callable[[JobState], list[str]] | None
    ) -> JobState:
        state, notes = agree_on_errors(lambda: self._read(source, check), f"loading {source}")
        for part in self._parts.values():
            part.finish_loading()
        for note in notes:
            say(note)
        return state

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

    def _clean(self, target: Path) -> bool:
        """Remove what a killed save has left; True if the checkpoint is there already."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        return target.exists()

    def _make_room(self, target: Path, needed: int) -> None:
        """Begin a checkpoint. Raises UserError when the disk is too full."""
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise UserError(
                f"no space left for a checkpoint: the disk of {self._folder} has {free / 2**20:.1f} MiB free and one "
                f"takes about {needed / 2**20:.1f} MiB; free some and start the same command again: the checkpoints "
                f"that are there are whole"
            )
        (_partial(target) / TENSORS).mkdir(parents=True)

    def _point_at(self, target: Path) -> None:
        write_atomically(self._folder / "latest", target.name + "\n")
        whole = [name for name in self._names() if (self._folder / name / MANIFEST_FILE).is_file()]
        for path in superfluous([self._folder / name for name in whole], self._keep_last_k, self._keep_every):
            remove_checkpoint(path)

    def _read(self, source: Path, check: Callable[[JobState], list[str]] | None) -> tuple[JobState, list[str]]:
        try:
            state = read_state(source)
            notes = [] if check is None else check(state)
            tensors = SavedTensors(source / TENSORS)
            for part in self._parts.values():
                notes += part.load(tensors)
        except Exception as error:
            raise UserError(f"{source} can't be loaded: {error}") from error
        return state, notes


def save_alone(folder: Path, state: JobState, pieces: Mapping[str, Pieces]) -> Path:
    """Write a checkpoint of what one process has, outside of any job; returns its folder."""
    target = folder / f"step_{state.step:08d}"
    partial = _partial(target)
    save_tensors(partial / TENSORS, pieces)
    _write_job(partial, state)
    _commit(partial, target, describe_files_alone(partial))
    write_atomically(folder / "latest", target.name + "\n")
    return target


def read_state(checkpoint: Path) -> JobState:
    """What job.json tells. Raises UserError when it can't be read, or is of another version of this program."""
    try:
        content = json.loads((checkpoint / JOB_FILE).read_text())
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{checkpoint} has format version {version}, this program reads {FORMAT_VERSION}: go on with the "
                "version that wrote it, or begin anew"
            )
        return JobState(**content)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {checkpoint / JOB_FILE}: {error}; delete {checkpoint} to use an older one"
        ) from error


def superfluous(checkpoints: Sequence[Path], keep_last_k: int, keep_every: int | None) -> list[Path]:
    """Those of complete checkpoints, oldest first, that are neither among the newest nor milestones."""
    return [
        path
        for path in checkpoints[:-keep_last_k]
        if not keep_every or int(path.name.removeprefix("step_")) % keep_every
    ]


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete one; renamed first: half a checkpoint must not carry a checkpoint's name."""
    doomed = _partial(checkpoint)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _needed_bytes(pieces: Mapping[str, Pieces], world_size: int) -> int:
    """Upper estimate of a checkpoint: every tensor once, whoever has copies. All ranks call this together."""
    own = {name: one.whole_bytes for name, one in pieces.items()}, sum(len(one.tensors) for one in pieces.values())
    every = [own]
    if world_size > 1:
        every = every * world_size
        dist.all_gather_object(every, own)
    tensors: dict[str, int] = {}
    for sizes, _ in every:
        tensors |= sizes
    return sum(tensors.values()) + _ENTRY_BYTES * sum(count for _, count in every) + (1 << 20)


def _write_job(partial: Path, state: JobState) -> None:
    (partial / JOB_FILE).write_text(json.dumps(asdict(state), indent=2, sort_keys=True) + "\n")


def _commit(partial: Path, target: Path, description: dict[str, dict[str, Any]]) -> None:
    write_atomically(partial / MANIFEST_FILE, strict_json(description, indent=1) + "\n")
    for folder in (path for path in partial.rglob("*") if path.is_dir()):
        sync_path(folder)
    os.rename(partial, target)
    sync_path(target.parent)
