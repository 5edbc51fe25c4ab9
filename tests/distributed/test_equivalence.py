"""A pairwise cover of the equivalence matrix; all of it is `make matrix`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from tests.distributed.cells import all_cells, complaints, pairwise_cover

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("processes", "part", "parts"), [(1, 0, 1), (2, 0, 1), (4, 0, 3), (4, 1, 3), (4, 2, 3)])
def test_layouts_train_as_one_rank_does(tiny_job: TinyJob, processes: int, part: int, parts: int) -> None:
    """Losses, gradients, weights and fast state after five steps, in layouts that have all pairs of choices."""
    cells = [cell for cell in pairwise_cover(all_cells()) if cell.processes == processes][part::parts]
    assert cells
    path = tiny_job.folder / "cells.json"
    path.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
    found = tiny_job.worker("equivalence.py", str(path), processes=processes)
    assert sorted(found) == sorted(cell.name for cell in cells)
    assert [text for cell in cells for text in complaints(cell, found[cell.name])] == []
