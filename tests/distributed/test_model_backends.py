"""Models of Megatron's layers: the reference cases in one process, and heads split over two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

CASES = Path(__file__).parents[1] / "golden_model"


def test_reference_cases_through_megatron_layers(tiny_job: TinyJob) -> None:
    found = tiny_job.worker("golden_model_checks.py", str(CASES), processes=1)
    assert found["failed"] == []
    assert found["arrays"] == [143, 117, 3]


def test_tensor_and_sequence_parallel_ranks_equal_one_process(tiny_job: TinyJob) -> None:
    """Loss, the gradient of every parameter by name, and reading with a cache: 1, 2, 4 ranks, tokens divided or not."""
    checked = tiny_job.worker("tensor_parallel_checks.py", processes=4)
    found = checked["errors"]
    assert len(found) == 2 * 2 * 5
    for layout, errors in found.items():
        limit = 1e-12 if "float64" in layout else 2e-5
        assert {name: error for name, error in errors.items() if not error < limit} == {}, layout
    # One bit of the last rank's sub-keys differs in the second comparison.
    assert len(checked["keys"]) == 4
    for first, second in checked["keys"]:
        assert first == "equal"
        assert "sub-keys of the memory in block 5 differ between rank 3 and rank 2" in second
