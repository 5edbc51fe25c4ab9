"""Tensors of a checkpoint as a rank has them: boxes of whole tensors, for torch.distributed.checkpoint.

A checkpoint knows whole tensors only. Each rank says which boxes of them it has, or wants; the library writes each box
once, whoever has copies of it, and cuts what is read out of the boxes that were written. So any layout reads what any
other has written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor of some shape, and where its elements are in a run of the flattened tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    """Place of its first element in the run."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements start..stop-1 of a flattened tensor as boxes, in order: at most two for each dimension but one.

    Raises ValueError where the run is not inside the tensor.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"elements {start} to {stop} of a tensor of shape {tuple(shape)}")
    return list(_boxes(tuple(shape), start, stop, 0)) if start < stop else []


def _boxes(shape: tuple[int, ...], start: int, stop: int, place: int) -> Iterator[Box]:
    if len(shape) <= 1:
        yield Box((start,) if shape else (), (stop - start,) if shape else (), place)
        return
    line = math.prod(shape[1:])
    first, last = -(-start // line), stop // line  # whole lines
    if first > last:  # inside one line
        yield from _within(shape, last, start - last * line, stop - last * line, place)
        return
    if start < first * line:
        yield from _within(shape, first - 1, start - (first - 1) * line, line, place)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield Box((first, *zeros), (last - first, *shape[1:]), place + first * line - start)
    if last * line < stop:
        yield from _within(shape, last, 0, stop - last * line, place + last * line - start)


def _within(shape: tuple[int, ...], line: int, start: int, stop: int, place: int) -> Iterator[Box]:
    for box in _boxes(shape[1:], start, stop, place):
        yield Box((line, *box.offsets), (1, *box.sizes), box.start)


class Staging:
    """Memory of the CPU that a state is copied into to be saved, kept for the next save: getting it anew costs more.

    On a machine with GPUs it is page-locked.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for one tensor; the same for the same name, as long as nothing else is asked for."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != torch.Size(shape) or kept.dtype != dtype:
            kept = torch.empty(tuple(shape), dtype=dtype, pin_memory=torch.cuda.is_available())
            self._kept[name] = kept
        return kept

    def release(self) -> None:
        """Give all memory back."""
        self._kept.clear()


class Pieces:
    """What a rank has of one whole tensor.

    Args:
        shape: of the whole
        dtype: of the whole
        pieces: (offsets, tensor) of each box; those that are read into are written in place
        owned: whether the pieces are copies that nothing changes until the next save

    The methods with two underscores are what torch.distributed.checkpoint asks of an object that it saves or loads.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        pieces: Iterable[tuple[Sequence[int], Tensor]] = (),
        *,
        owned: bool = False,
    ) -> None:
        self.shape, self.dtype, self._owned = torch.Size(shape), dtype, owned
        self._pieces = {torch.Size(offsets): tensor for offsets, tensor in pieces if tensor.numel()}

    @classmethod
    def whole(cls, tensor: Tensor) -> Pieces:
        """All of a tensor; one number as a vector of one."""
        tensor = tensor.detach().reshape(tensor.shape or (1,))
        return cls(tensor.shape, tensor.dtype, [((0,) * tensor.dim(), tensor)])

    @classmethod
    def of_run(
        cls, run: Tensor, start: int, part_shape: Sequence[int], split: int | None = None, rank: int = 0, ranks: int = 1
    ) -> Pieces:
        """Elements `start` and on of a rank's flattened part of a tensor, split evenly along a dimension over ranks.

        Without `split` the part is the whole. The pieces are views of `run`.
        """
        shape, moved = list(part_shape), [0] * len(part_shape)
        if split is not None:
            moved[split] = rank * shape[split]
            shape[split] *= ranks
        pieces = []
        for box in boxes_of_run(part_shape, start, start + run.numel()):
            offsets = [offset + by for offset, by in zip(box.offsets, moved, strict=True)]
            pieces.append((offsets, run.detach()[box.start : box.start + box.numel].view(box.sizes)))
        return cls(shape, run.dtype, pieces)

    @property
    def tensors(self) -> list[Tensor]:
        """The pieces, in the order given."""
        return list(self._pieces.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the pieces."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def copied(self, name: str, staging: Staging) -> Pieces:
        """The same pieces on the CPU, in memory kept under a name."""
        if self._owned:
            return self
        copies = [
            (offsets, staging.buffer(f"{name} {number}", tensor.shape, tensor.dtype).copy_(tensor))
            for number, (offsets, tensor) in enumerate(self._pieces.items())
        ]
        return Pieces(self.shape, self.dtype, copies, owned=True)

    def size(self) -> torch.Size:
        """Shape of the whole, as tensors have it."""
        return self.shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, tensor.shape) for offsets, tensor in self._pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._pieces[index.offset]
