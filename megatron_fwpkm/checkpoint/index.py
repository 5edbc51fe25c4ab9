"""Reading the index of a folder that torch.distributed.checkpoint has written, without running what it says.

The index is a pickle: data, and instructions that call whatever they name. Here every name stands for a blank of this
module, made anew for each reading, that keeps what it is given; any other name is refused. Then the library's own
objects are made of what the blanks have, if that is an index. So none can run code or change this program; one that was
made to can still take much time and memory, or overflow the stack.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX_FILE = ".metadata"
_LIBRARY = "torch.distributed.checkpoint"
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class _Blank:
    """What a pickle builds instead of an object of the library."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _blanks() -> dict[tuple[str, str], Any]:
    """By module and name, what an index of any version of Python and of the library is made of."""

    def nothing(*arguments: object) -> None:
        """Of what is not needed: where the folder was, orders of dimensions."""

    def size(numbers: Sequence[int] = ()) -> tuple[int, ...]:
        return tuple(numbers)

    names = {
        f"{_LIBRARY}.metadata": (
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
            "StorageMeta",
        ),
        f"{_LIBRARY}.filesystem": ("_StorageInfo",),
    }
    found: dict[tuple[str, str], Any] = {
        (module, name): type(name, (_Blank,), {}) for module, group in names.items() for name in group
    }
    for module in ("pathlib", "pathlib._local"):  # the latter since Python 3.13
        for kind in ("PosixPath", "WindowsPath"):
            found[module, kind] = nothing
    found[f"{_LIBRARY}.metadata", "_MEM_FORMAT_ENCODING"] = nothing
    found["builtins", "getattr"] = nothing  # as some versions name a member of an enumeration
    found["torch.serialization", "_get_layout"] = nothing
    found["torch", "Size"] = size
    return found | {("torch", name): dtype for name, dtype in _DTYPES.items()}


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._blanks = _blanks()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._blanks[module, name]
        except KeyError:
            raise ValueError(f"it names {f'{module}.{name}'!r}, which is in no index of tensors") from None


def read_index(folder: Path) -> Metadata:
    """The index of a folder. Raises ValueError if it can't be read, or is none."""
    path = folder / INDEX_FILE
    try:
        with open(path, "rb") as file:
            return _as_metadata(_IndexUnpickler(file).load())
    except Exception as error:  # damaged pickles raise errors of any kind
        raise ValueError(f"cannot read {path}: {error}") from error


def _as_metadata(found: Any) -> Metadata:
    content = _fields(found, "Metadata")
    tensors = {_is(str, name): _tensor(name, entry) for name, entry in content["state_dict_metadata"].items()}
    places = {}
    for key, value in content["storage_data"].items():
        at, place = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        name = _is(str, place["relative_path"])
        if Path(name).name != name:
            raise ValueError(f"it names {name!r}, which is not beside it")
        index = MetadataIndex(_is(str, at["fqn"]), _size(at["offset"]), at["index"])
        places[index] = _StorageInfo(name, _is(int, place["offset"]), _is(int, place["length"]))
    for name, tensor in tensors.items():
        for number, chunk in enumerate(tensor.chunks):
            if MetadataIndex(name, chunk.offsets, number) not in places:
                raise ValueError(f"it doesn't tell where {name!r} is")
    return Metadata(tensors, storage_data=places)  # type: ignore[arg-type]


def _tensor(name: str, entry: Any) -> TensorStorageMetadata:
    content = _fields(entry, "TensorStorageMetadata")
    dtype = _is(torch.dtype, _is(tuple, content["properties"].state)[0])
    size, chunks = _size(content["size"]), []
    for one in content["chunks"]:
        chunk = _fields(one, "ChunkStorageMetadata")
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        ends = [start + length for start, length in zip(offsets, sizes, strict=True)]
        if any(end > whole for end, whole in zip(ends, size, strict=True)):
            raise ValueError(f"a part of {name!r} is outside of it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    there = sum(math.prod(chunk.sizes) for chunk in chunks)
    if there != math.prod(size) or _overlap(chunks):
        raise ValueError(f"its parts of {name!r} don't make up the whole")
    if there * dtype.itemsize >= 1 << 62:
        raise ValueError(f"{name!r} is larger than any memory")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether two parts have an element in common."""
    active: list[tuple[int, ChunkStorageMetadata]] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[:1]):
        begin, length = (chunk.offsets[0], chunk.sizes[0]) if chunk.sizes else (0, 1)
        active = [(end, other) for end, other in active if end > begin]
        for _, other in active:
            places = zip(chunk.offsets, chunk.sizes, other.offsets, other.sizes, strict=True)
            if all(a < b + n and b < a + m for a, m, b, n in places):
                return True
        active.append((begin + length, chunk))
    return False


def _fields(found: Any, kind: str) -> dict[str, Any]:
    if type(found).__name__ != kind or not isinstance(found, _Blank):
        raise ValueError(f"where it should have a {kind} it has something else")
    return _is(dict, found.state)  # type: ignore[no-any-return]


def _size(found: Any) -> torch.Size:
    numbers = _is(tuple, found)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("it has a size that is none")
    return torch.Size(numbers)


def _is(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it has a {type(value).__name__} where a {kind.__name__} should be")
    return value
