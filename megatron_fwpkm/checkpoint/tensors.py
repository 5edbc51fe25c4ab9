"""The tensors of a checkpoint: a folder that torch.distributed.checkpoint writes, all ranks together, and anyone reads.

That library carries them because every rank need only say which boxes of which whole tensors it has (pieces.py):
weights under tensor and pipeline parallelism, the flat partitions of every ZeRO stage, rows or columns of memories.
(The universal checkpoints of DeepSpeed are made by a second pass over the files of ranks, of ZeRO stages 1 to 3 alone,
and know parameters only.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as library
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.futures import Future

from megatron_fwpkm.checkpoint.index import read_index
from megatron_fwpkm.checkpoint.pieces import Pieces


class _SavePlanner(library.DefaultSavePlanner):
    def create_global_plan(self, all_plans: list[library.SavePlan]) -> tuple[list[library.SavePlan], Metadata]:
        plan, metadata = super().create_global_plan(all_plans)
        # The base class looks for boxes that overlap, and for gaps where several ranks write.
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                there = sum(chunk.sizes.numel() for chunk in entry.chunks)
                if there != entry.size.numel():
                    raise ValueError(f"ranks have {there} of the {entry.size.numel()} elements of {name}")
        return plan, metadata

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(library.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # The base class copies what is neither a tensor nor one of its own types.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)  # type: ignore[no-any-return, union-attr]


class _Reader(library.FileSystemReader):
    """Reads each piece of a file once, however many boxes are cut out of it; the library's reads it anew for each."""

    def read_data(self, plan: library.LoadPlan, planner: library.LoadPlanner) -> Future[None]:
        items: dict[MetadataIndex, list[Any]] = {}
        for item in plan.items:
            items.setdefault(item.storage_index, []).append(item)
        for index, wanted in items.items():
            place = self.storage_data[index]
            path = Path(self.path) / place.relative_path
            try:
                with open(path, "rb") as file:
                    stored = torch.load(self._slice_file(file, place), map_location="cpu", weights_only=True)
                for item in wanted:
                    lengths = zip(item.storage_offsets, item.lengths, strict=True)
                    values = stored[tuple(slice(begin, begin + length) for begin, length in lengths)]
                    target = planner.resolve_tensor(item).detach()
                    if values.shape != target.shape or values.dtype != target.dtype:
                        raise ValueError("it has another tensor than the index says")
                    target.copy_(values)
                    planner.commit_tensor(item, target)
            except Exception as error:  # damaged files raise errors of any kind
                raise ValueError(f"cannot read {path}: {error}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


_PLAIN: Any = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


def save_tensors(folder: Path, pieces: Mapping[str, Pieces], group: dist.ProcessGroup | None = None) -> None:
    """Write what the ranks of a group have together: every rank calls this, and one of those that have a box writes it.

    Without a group and outside of one this process has everything. Nothing is forced to the disk. Raises on each rank
    its own error, on no other, so that all must then agree; ValueError, on the first, when the boxes of a tensor don't
    make up the whole.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of one process, as meant
        try:
            library.save(
                dict(pieces),
                # Copying ahead to the CPU would have a stream of its own on the GPU.
                storage_writer=library.FileSystemWriter(
                    folder, sync_files=False, overwrite=False, per_thread_copy_ahead=0
                ),
                planner=_SavePlanner(dedup_save_to_lowest_rank=False, **_PLAIN),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        except library.CheckpointException as error:
            failures: Mapping[int, Any] = error.failures
            own = failures.get(dist.get_rank(group) if dist.is_initialized() else 0)
            if own is not None:
                raise (own[0] if isinstance(own[0], Exception) else RuntimeError(str(own[0]))) from error


@dataclass(frozen=True)
class TensorDescription:
    """A whole tensor of a checkpoint."""

    shape: torch.Size
    dtype: torch.dtype


class SavedTensors:
    """The tensors in a folder. Reading is each process's own affair: no call waits for another rank.

    No file can make reading it run code. Every method raises ValueError when the folder can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _metadata(self) -> Metadata:
        return read_index(self._folder)

    @property
    def files(self) -> set[str]:
        """Names of the files that have the tensors."""
        return {place.relative_path for place in (self._metadata.storage_data or {}).values()}

    @cached_property
    def descriptions(self) -> dict[str, TensorDescription]:
        """Every tensor by name, sorted."""
        return {
            name: TensorDescription(entry.size, entry.properties.dtype)
            for name, entry in sorted(self._metadata.state_dict_metadata.items())
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, wanted: Mapping[str, Pieces]) -> None:
        """Fill pieces, in place. Raises ValueError, before anything is read, for a tensor that is not there so."""
        for name, pieces in wanted.items():
            found = self.descriptions.get(name)
            if found is None:
                raise ValueError(f"there is no tensor {name}")
            if (found.shape, found.dtype) != (pieces.shape, pieces.dtype):
                raise ValueError(
                    f"{name} has shape {tuple(found.shape)} ({found.dtype}), this job's has {tuple(pieces.shape)} "
                    f"({pieces.dtype})"
                )
        # As library.load() does it for one process.
        reader, planner = _Reader(self._folder), _LoadPlanner(**_PLAIN)
        planner.set_up_planner(dict(wanted), self._metadata, is_coordinator=True)
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        plan = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
        reader.read_data(planner.finish_plan(reader.prepare_global_plan(plan)[0]), planner).wait()

    def read_like(self, name: str, like: Tensor) -> Tensor:
        """One whole tensor, which must have that shape and dtype. Raises ValueError if it is not so."""
        try:
            tensor = torch.empty(like.shape, dtype=like.dtype)
        except RuntimeError as error:
            raise ValueError(f"{name} takes {like.nbytes:,} bytes: {error}") from error
        self.read({name: Pieces.whole(tensor)})
        return tensor

    def number(self, name: str) -> float:
        """A tensor of one number. Raises ValueError if it is none."""
        tensor = self.whole(name)
        if tensor.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} instead of one number")
        return tensor.item()

    def whole(self, name: str) -> Tensor:
        """One whole tensor. Raises ValueError if there is none of that name."""
        if name not in self.descriptions:
            raise ValueError(f"there is no tensor {name}")
        description = self.descriptions[name]
        return self.read_like(name, torch.empty(description.shape, dtype=description.dtype, device="meta"))
