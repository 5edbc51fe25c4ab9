"""Boxes of tensors, and files of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_fwpkm.checkpoint.parts import SlotRows, copy_in_portions
from megatron_fwpkm.checkpoint.pieces import Pieces, Staging, boxes_of_run
from megatron_fwpkm.checkpoint.tensors import SavedTensors, save_tensors
from megatron_fwpkm.memory.routing import owned_slots


@pytest.mark.parametrize("seed", range(50))
def test_a_run_is_made_of_few_disjoint_boxes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    shape = [draw(1, 6) for _ in range(draw(0, 4))]
    size = math.prod(shape)
    start = draw(0, size)
    stop = draw(start, size)
    run = torch.arange(start, stop) + 1
    found = torch.zeros(shape, dtype=torch.int64)
    boxes = boxes_of_run(shape, start, stop)
    for box in boxes:
        part = found[tuple(slice(at, at + length) for at, length in zip(box.offsets, box.sizes, strict=True))]
        part += run[box.start : box.start + box.numel].view(box.sizes)
    wanted = torch.zeros(size, dtype=torch.int64)
    wanted[start:stop] = run
    assert torch.equal(found.flatten(), wanted)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_runs_outside_a_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"elements 3 to 7 of a tensor of shape \(2, 3\)"):
        boxes_of_run((2, 3), 3, 7)


def parts(whole: Tensor, ranks: int, split: int | None, cuts: list[int]) -> list[Pieces]:
    """A tensor as tensor-parallel ranks have it, each of whose parts is cut into the runs of replicas."""
    found = []
    for rank in range(ranks):
        part = whole if split is None else whole.chunk(ranks, split)[rank]
        flat, shape = part.contiguous().flatten(), part.shape
        bounds = [0, *cuts, flat.numel()]
        for start, stop in itertools.pairwise(bounds):
            place = (None, 0, 1) if split is None else (split, rank, ranks)
            found.append(Pieces.of_run(flat[start:stop].clone(), start, shape, *place))
    return found


def joined(several: list[Pieces]) -> Pieces:
    """As if one rank had what several have."""
    pieces = [piece for one in several for piece in one._pieces.items()]
    return Pieces(several[0].shape, several[0].dtype, pieces)


LAYOUTS = [(1, None, []), (2, 0, [5]), (3, 1, [2, 4]), (4, 0, []), (2, 2, [1, 11])]


@pytest.mark.parametrize("written", LAYOUTS)
@pytest.mark.parametrize("read", LAYOUTS)
def test_any_layout_reads_what_another_has_written(
    tmp_path: Path, written: tuple[int, int | None, list[int]], read: tuple[int, int | None, list[int]]
) -> None:
    whole = torch.randn(12, 3, 4, dtype=torch.float64)
    save_tensors(tmp_path / "t", {"a": joined(parts(whole, *written))})
    source = SavedTensors(tmp_path / "t")
    assert torch.equal(source.whole("a"), whole)
    for found, wanted in zip(parts(torch.zeros_like(whole), *read), parts(whole, *read), strict=True):
        source.read({"a": found})
        assert all(torch.equal(one, other) for one, other in zip(found.tensors, wanted.tensors, strict=True))


def test_each_piece_of_a_file_is_read_once(tmp_path: Path) -> None:
    """However many boxes are cut out of it: tables of slots are read in as many as there are classes of rows."""
    table = torch.randn(20**2, 3)
    saved = SlotRows(20, 3).pieces("t", table, Staging())
    save_tensors(tmp_path / "t", {"t": saved})
    source = SavedTensors(tmp_path / "t")
    rows = SlotRows(20, 3, rank=1, ranks=3)
    slots = owned_slots(20, 1, 3)  # below 0: no row of anybody's
    with mock.patch.object(torch, "load", wraps=torch.load) as load:
        found = rows.read(source, "t", torch.empty(len(slots), 3))
    assert load.call_count == 1 and len(rows.pieces("u", found, Staging()).tensors) > 3
    assert torch.equal(found[slots >= 0], table[slots[slots >= 0]])


def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"a": Pieces.whole(torch.ones(2, 3)), "b": Pieces.whole(torch.tensor(2.5))})
    source = SavedTensors(tmp_path / "t")
    found = torch.zeros(2, 3)
    for wanted, message in (
        ({"c": Pieces.whole(torch.ones(1))}, "there is no tensor c"),
        ({"b": Pieces.whole(torch.ones(2))}, r"b has shape \(1,\).*this job's has \(2,\)"),
        ({"b": Pieces.whole(torch.ones(1).double())}, r"float32\), this job's has \(1,\) \(torch.float64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            source.read({"a": Pieces.whole(found), **wanted})
    assert not found.any()
    assert source.whole("b").item() == 2.5


def test_tensors_with_gaps_or_overlaps_are_not_written(tmp_path: Path) -> None:
    twice = Pieces((2, 2), torch.float32, [((0, 0), torch.ones(2, 2)), ((1, 0), torch.ones(1, 2))])
    with pytest.raises(ValueError, match="overlapping"):
        save_tensors(tmp_path / "t", {"a": twice})


def test_copies_stay_as_they_were() -> None:
    tensor = torch.zeros(4)
    view = Pieces.whole(tensor)
    staging = Staging()
    copy = view.copied("a", staging)
    tensor += 1
    assert view.tensors[0].tolist() == [1.0] * 4 and copy.tensors[0].tolist() == [0.0] * 4
    assert copy.copied("a", staging) is copy
    again = view.copied("a", staging)
    assert again.tensors[0].data_ptr() == copy.tensors[0].data_ptr()  # of the save before
    assert view.copied("b", staging).tensors[0].data_ptr() != again.tensors[0].data_ptr()
    assert copy.num_bytes == copy.whole_bytes == 16


@pytest.mark.parametrize("most_bytes", [1, 24, 100, 1 << 26])
@pytest.mark.parametrize("shape", [(10, 3), (10,)])
def test_rows_copied_in_portions(shape: tuple[int, ...], most_bytes: int) -> None:
    """As from another device, which these tests have not."""
    table, rows = torch.randn(shape), torch.tensor([3, 1, 4, 1, 5, 9, 2])
    target = torch.empty(len(rows), *shape[1:])
    copy_in_portions(table, rows, target, most_bytes)
    assert torch.equal(target, table[rows])
