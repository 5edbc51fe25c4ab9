"""Parts of a job over two ranks: skipped steps, evaluation, shares of the data, parallel layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[dict[str, Any]]:
    """What the checks of workers/step_checks.py found, in one start of two processes."""
    from tests.distributed.conftest import TinyJob

    job = TinyJob(tmp_path_factory.mktemp("parts"), tiny_data)
    yield job.worker("step_checks.py")
    job.end()


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(found: dict[str, Any], poison: str) -> None:
    assert found[f"non_finite_{poison}"] == {
        "applied": [True, False, True],
        "stop": [False, True, False],
        "unchanged": True,
        "good": True,
        "changed_later": True,
    }


def test_evaluation_changes_nothing(found: dict[str, Any]) -> None:
    assert found["evaluation"] == {
        "repeatable": True,
        "unchanged": True,
        "reads_matter": True,
        "tokens": 8 * 64,
        "training": True,
        "reads_on": True,
    }


def test_statistics_and_histograms_are_means_over_ranks_and_microbatches(found: dict[str, Any]) -> None:
    assert found["statistics"] == {
        "microbatches": 4,
        "names": ["gate_histogram", "reads_histogram"],
        "sizes": [10, 16],
        "tags": True,
        "means": True,
        "loss": True,
        "labels": True,
        "agreed": True,
    }


def test_ranks_read_disjoint_shares(found: dict[str, Any]) -> None:
    shares = found["shares"]
    assert shares["sequences"] - 4 < shares["read"] <= shares["sequences"]
    assert shares["surplus"] == 0  # none more often than the corpus has it


def test_further_parts_are_saved_and_a_failed_one_leaves_nothing_half(found: dict[str, Any]) -> None:
    assert found["parts"] == {
        "failed": "1: failed while preparing a checkpoint: OSError: can't read the device",
        "names": ["latest", "step_00000001"],
        "said": ["counted to 10", "counted to 11"],
        "needed": True,
        "restored": True,
        "same": True,
        "generators": True,
    }


def test_megatron_layers_equal_plain_ones(tiny_job: TinyJob) -> None:
    found = tiny_job.worker("backend_checks.py", processes=1)
    assert found["names"] and found["weights"]
    assert found["loss"] < 1e-6
    assert found["gradient"] < 1e-6
