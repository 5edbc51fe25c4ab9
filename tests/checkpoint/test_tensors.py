"""Folders of tensors that are damaged, hostile, or not what is asked for."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fwpkm.checkpoint.parts import embedding_rows
from megatron_fwpkm.checkpoint.pieces import Pieces
from megatron_fwpkm.checkpoint.tensors import INDEX_FILE, SavedTensors, save_tensors


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
    with pytest.raises(ValueError, match=r"cannot read .*/\.metadata: it names \S+\.system, which is in no index"):
        _ = SavedTensors(folder).descriptions
    assert not trace.exists()


def test_an_index_names_its_own_folder_only(folder: Path) -> None:
    index = (folder / INDEX_FILE).read_bytes()
    (folder / INDEX_FILE).write_bytes(index.replace(b"__0_0.distcp", b"../../distcp"))
    with pytest.raises(ValueError, match=r"it names \.\./\.\./distcp, which is not beside it"):
        SavedTensors(folder).whole("torch.uint8")


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
