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


def test_two_tensor_parallel_ranks_equal_one_process(tiny_job: TinyJob) -> None:
    found = tiny_job.worker("tensor_parallel_checks.py")
    assert found["weight"] == 0
    assert found["loss"] < 1e-6
    assert found["gradient"] < 2e-5
    # Every mixer's projections are split, and so is what belongs to single heads.
    for name in ("in_qkvz.weight", "in_ba.weight", "convolution", "dt_bias", "A_log", "output.weight"):
        assert f"blocks.0.mixer.{name}" in found["split"]
    for name in ("query_gate.weight", "key.weight", "value.weight", "output.weight"):
        assert f"blocks.1.mixer.{name}" in found["split"] and f"blocks.2.mixer.{name}" in found["split"]
    assert "head.weight" in found["split"] and "embedding.weight" in found["split"]
