"""Folders of tensors that are damaged, hostile, or not what is asked for."""

from __future__ import annotations

import contextlib
import enum
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as library
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_fwpkm.checkpoint.index import INDEX_FILE
from megatron_fwpkm.checkpoint.parts import embedding_rows
from megatron_fwpkm.checkpoint.pieces import Pieces
from megatron_fwpkm.checkpoint.tensors import SavedTensors, save_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An embedding of 100 rows, and one tensor of every type that checkpoints have."""
    tensors = {"slow/embedding.weight": torch.randn(100, 3)}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64):
        tensors[str(dtype)] = torch.randn(4).to(dtype)
    save_tensors(tmp_path / "t", {name: Pieces.whole(tensor) for name, tensor in tensors.items()})
    return tmp_path / "t"


class Hostile:
    """Runs a command where a pickle of it is read as pickles usually are."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def test_no_index_runs_code(folder: Path) -> None:
    source = SavedTensors(folder)
    assert len(source.descriptions) == 7 and all(source.whole(name) is not None for name in source.descriptions)
    trace = folder / "trace"
    index = pickle.dumps(Hostile(f"touch {trace}"))
    pickle.loads(index)
    assert trace.exists()
    trace.unlink()
    (folder / INDEX_FILE).write_bytes(index)
    with pytest.raises(ValueError, match=r"cannot read .*/\.metadata: it names '\S+\.system', which is in no index"):
        _ = SavedTensors(folder).descriptions
    assert not trace.exists()


@pytest.mark.parametrize("name", ["pathlib PosixPath", "torch Size", "torch float32", "builtins getattr"])
def test_no_index_changes_what_it_names(folder: Path, name: str) -> None:
    """A pickle may set attributes of what it names, classes among them."""
    before, genuine = dict(vars(PosixPath)), (folder / INDEX_FILE).read_bytes()
    # Name it, give it a state of nothing and of one attribute, drop it; then what was there.
    module, attribute = name.split()
    change = f"c{module}\n{attribute}\n(N(dV__truediv__\nI1\nstb0".encode()
    (folder / INDEX_FILE).write_bytes(genuine[:2] + change + genuine[2:])
    with contextlib.suppress(ValueError):
        _ = SavedTensors(folder).descriptions
    assert dict(vars(PosixPath)) == before and Path("a") / "b" == Path("a/b")
    assert not hasattr(torch.Size, "__truediv__")


# As pathlib has it from Python 3.13 on.
_LocalPath = type("PosixPath", (), {"__module__": "pathlib._local", "__init__": lambda self, *parts: None})


class _OtherPythons(pickle.Pickler):
    """Writes an index as other versions of Python do."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, enum.Enum):  # by name
            return getattr, (type(value), value.name)
        if isinstance(value, PosixPath):
            return _LocalPath, value.parts
        return NotImplemented


def test_an_index_of_another_python_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = SavedTensors(folder).descriptions
    content = library.FileSystemReader(folder).read_metadata()
    monkeypatch.setitem(sys.modules, "pathlib._local", SimpleNamespace(PosixPath=_LocalPath))
    with open(folder / INDEX_FILE, "wb") as file:
        _OtherPythons(file).dump(content)
    written = (folder / INDEX_FILE).read_bytes()
    assert b"getattr" in written and b"pathlib._local" in written
    assert SavedTensors(folder).descriptions == wanted
    assert SavedTensors(folder).whole("torch.uint8").dtype == torch.uint8


def _changed(folder: Path, change: Callable[[Any], object]) -> SavedTensors:
    """The folder with another index: the library's own, changed."""
    content = library.FileSystemReader(folder).read_metadata()
    change(content)
    (folder / INDEX_FILE).write_bytes(pickle.dumps(content))
    return SavedTensors(folder)


def _twice(content: Any) -> None:
    """The first half of a tensor two times, and no second."""
    entry = content.state_dict_metadata["torch.uint8"]
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    entry.chunks[:] = [chunk, chunk]


def _place(content: Any) -> Any:
    return content.storage_data[MetadataIndex("torch.uint8", torch.Size([0]))]


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a file elsewhere": (
        lambda c: setattr(_place(c), "relative_path", "../x"),
        r"it names '\.\./x', which is not beside it",
    ),
    "no name": (lambda c: setattr(_place(c), "relative_path", 5), "it has a int where a str should be"),
    "places of another kind": (lambda c: setattr(c, "storage_data", [1]), "'list' object has no attribute"),
    "no places": (lambda c: c.storage_data.clear(), "it doesn't tell where .* is"),
    "no tensors": (lambda c: setattr(c, "state_dict_metadata", [1]), "'list' object has no attribute"),
    "another entry": (lambda c: c.state_dict_metadata.update(a=7), "should have a TensorStorageMetadata"),
    "no size": (
        lambda c: setattr(c.state_dict_metadata["torch.uint8"], "size", "4"),
        "it has a str where a tuple should be",
    ),
    "another size": (
        lambda c: setattr(c.state_dict_metadata["torch.uint8"], "size", torch.Size([5])),
        "its parts of .torch.uint8. don't make up the whole",
    ),
    "a part outside": (
        lambda c: setattr(c.state_dict_metadata["torch.uint8"], "size", torch.Size([3])),
        "a part of .torch.uint8. is outside of it",
    ),
    "a part twice": (_twice, "its parts of .* make up the whole"),
    "no parts": (lambda c: c.state_dict_metadata["torch.uint8"].chunks.clear(), "its parts of .* make up the whole"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_is_none_is_refused(folder: Path, name: str) -> None:
    change, words = CHANGES[name]
    source = _changed(folder, change)
    with pytest.raises(ValueError, match=rf"cannot read .*/\.metadata: .*{words}"):
        source.whole("torch.uint8")


def test_a_file_with_other_tensors_than_the_index_says_is_refused(folder: Path) -> None:
    def shorten(content: Any) -> None:
        entry = content.state_dict_metadata["torch.uint8"]
        entry.size = torch.Size([9])
        entry.chunks[0].sizes = torch.Size([9])

    with pytest.raises(ValueError, match="it has another tensor than the index says"):
        _changed(folder, shorten).whole("torch.uint8")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "another pickle"])
def test_a_damaged_index_is_named(folder: Path, damage: str) -> None:
    path = folder / INDEX_FILE
    index = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut short": index[: len(index) // 2]}.get(damage, pickle.dumps([1])))
    with pytest.raises(ValueError, match=r"cannot read .*/\.metadata: "):
        SavedTensors(folder).whole("torch.uint8")


def test_a_damaged_file_is_named(folder: Path) -> None:
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read .*/__0_0\.distcp: "):
        SavedTensors(folder).whole("torch.uint8")


def test_what_nobody_has_is_not_written(tmp_path: Path) -> None:
    gap = Pieces((4,), torch.float32, [((0,), torch.ones(3))])
    with pytest.raises(ValueError, match="ranks have 3 of the 4 elements of a"):
        save_tensors(tmp_path / "t", {"a": gap})


def test_rows_of_the_embedding(folder: Path) -> None:
    source = SavedTensors(folder)
    assert embedding_rows(source) == embedding_rows(source, 4, 100) == 100
    with pytest.raises(ValueError, match=r"has 100 rows, which can't be split over parallel\.tensor=3"):
        embedding_rows(source, 3)
    with pytest.raises(ValueError, match="has 100 rows, and the tokenizer of the data 101 tokens"):
        embedding_rows(source, 1, 101)
    save_tensors(folder / "none", {"a": Pieces.whole(torch.ones(1))})
    with pytest.raises(ValueError, match=r"there is no tensor slow/embedding\.weight"):
        embedding_rows(SavedTensors(folder / "none"))
