"""Checkpoints of a whole job: complete under their own name, or not there (folder.py tells what lies where).

A checkpoint belongs to no layout: any number of processes laid out in any way reads it.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fwpkm.checkpoint.files import JOB_FILE, TENSORS, describe_files, describe_files_alone
from megatron_fwpkm.checkpoint.folder import (
    checkpoint_path,
    commit,
    make_room,
    partial_of,
    point_at,
    remove_leftovers,
    remove_superfluous,
)
from megatron_fwpkm.checkpoint.parts import CheckpointPart
from megatron_fwpkm.checkpoint.pieces import Pieces, Staging
from megatron_fwpkm.checkpoint.tensors import SavedTensors, save_tensors
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors, on_leader
from megatron_fwpkm.phase import PHASE

FORMAT_VERSION = 3
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
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._report: SaveReport | None = None
        self.error: BaseException | None = None
        self.failed_while = ""
        # A process that ends for another reason does not wait for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._device is not None:  # a new thread's is the first one, whosever that is
                torch.cuda.set_device(self._device)
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
        group: a process group of all ranks for what is exchanged about files: training's exchanges go on in the default
            one. None: `group_for_files` makes one
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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._folder = folder
        self._topology = topology
        self._parts = dict(parts)
        self._keep_last_k, self._keep_every = keep_last_k, keep_every
        self._asynchronous = asynchronous
        self._group = group or group_for_files()
        self._staging = Staging()
        self._writing: _Writing | None = None
        self._reports: list[SaveReport] = []

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
        target = checkpoint_path(self._folder, state.step)
        with PHASE.during("preparing a checkpoint"):
            if on_leader(lambda: self._is_there(target), "preparing a checkpoint", self._group):
                on_leader(lambda: self._committed(target), "writing a checkpoint", self._group)
                return target
            pieces = agree_on_errors(self._pieces, "preparing a checkpoint", self._group)
            needed = _needed_bytes(pieces, self._group)
            on_leader(lambda: make_room(target, needed), "preparing a checkpoint", self._group)
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
        what, partial = "writing a checkpoint", partial_of(target)
        try:
            agree_on_errors(lambda: save_tensors(partial / TENSORS, pieces, self._group), what, self._group)
            on_leader(lambda: _write_job(partial, state), what, self._group)
            description = describe_files(partial, self._topology, self._group)
            on_leader(lambda: commit(target, description), what, self._group)
        except Exception:
            if self._topology.is_leader:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        on_leader(lambda: self._committed(target), what, self._group)
        return sum(entry["bytes"] for entry in description.values())

    def _is_there(self, target: Path) -> bool:
        """Whether the checkpoint is there already; what a killed save has left is removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        return target.exists()

    def _committed(self, target: Path) -> None:
        point_at(target)
        remove_superfluous(self._folder, self._keep_last_k, self._keep_every)

    def load(
        self, source: Path, say: Callable[[str], None], check: Callable[[JobState], list[str]] | None = None
    ) -> JobState:
        """Restore a checkpoint of any run that is known to be whole; returns the state that has no owner.

        `check` looks at that before anything is taken over; `say` gets what it and the parts, on whatever rank, have to
        tell. Raises SharedUserError if the checkpoint does not fit this job.
        """
        state, own = agree_on_errors(lambda: self._read(source, check), f"loading {source}", self._group)
        for part in self._parts.values():
            part.finish_loading()
        notes = [own] * self._topology.world_size
        dist.all_gather_object(notes, own, group=self._group)
        for note in dict.fromkeys(note for of_rank in notes for note in of_rank):
            say(note)
        return state

    def _read(self, source: Path, check: Callable[[JobState], list[str]] | None) -> tuple[JobState, list[str]]:
        try:
            state = read_state(source)
            notes = [] if check is None else check(state)
            tensors = SavedTensors(source / TENSORS)
            for part in self._parts.values():
                notes += part.load(tensors)
        except (UserError, ValueError, OSError) as error:
            raise UserError(f"{source} can't be loaded: {error}") from error
        return state, notes


def group_for_files(timeout_seconds: float = 1800.0) -> dist.ProcessGroup:
    """A process group of all ranks in which one waits so long for another that reads or writes files."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))  # type: ignore[no-any-return]


def save_alone(folder: Path, state: JobState, pieces: Mapping[str, Pieces]) -> Path:
    """Write a checkpoint of what one process has, outside of any job; returns its folder."""
    target = checkpoint_path(folder, state.step)
    partial = partial_of(target)
    save_tensors(partial / TENSORS, pieces)
    _write_job(partial, state)
    commit(target, describe_files_alone(partial))
    point_at(target)
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


def _needed_bytes(pieces: Mapping[str, Pieces], group: dist.ProcessGroup) -> int:
    """Upper estimate of a checkpoint: what all ranks have. All ranks call this together."""
    own = sum(one.num_bytes + _ENTRY_BYTES * len(one.tensors) for one in pieces.values())
    total = torch.tensor(own)
    dist.all_reduce(total, group=group)
    return int(total) + (1 << 20)


def _write_job(partial: Path, state: JobState) -> None:
    (partial / JOB_FILE).write_text(json.dumps(asdict(state), indent=2, sort_keys=True) + "\n")
