"""PKM layers spread over ranks compute and train what a whole one in one process does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[dict[str, Any]]:
    """What the checks found in four processes, in one start."""
    from tests.distributed.conftest import TinyJob

    folder = tmp_path_factory.mktemp("pkm")
    job = TinyJob(folder, tiny_data)
    yield job.worker("pkm_checks.py", str(folder / "tables"), processes=4)
    job.end()


def test_layers_over_2_3_or_4_ranks_equal_a_whole_one(found: dict[str, Any]) -> None:
    """Initial weights bitwise; outputs, gradients of the input, of each weight by name and of the values in float64."""
    cases = found["layers"]
    assert len(cases) == 6 * 3 * 2 and all(len(errors) == 9 * 2 + 4 for errors in cases.values())
    errors = {f"{case}: {name}": error for case, by_name in cases.items() for name, error in by_name.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-13} == {}
    assert {error for name, error in errors.items() if "initial" in name} == {0.0}


def test_training_over_2_ranks_and_2_replicas_equals_one_process(found: dict[str, Any]) -> None:
    """Clipping by the norm of all gradients, AdamW, and touched rows with moments, counts and clocks, in float64."""
    trained = found["trained"]
    assert {name: error for name, error in trained["errors"].items() if not error < 1e-12} == {}
    assert max(trained["norms"]) < 1e-12 and trained["clipped"]
    assert len(trained["updates"]) > 2 and trained["updates"][0] == 0  # some rows missed steps
    assert trained["replicas_equal"]
    assert trained["rows"] == [25, 18]  # rank 0 of 7² and of 6² slots
    assert [all - dense for all, dense in zip(trained["counted"], trained["parameters"], strict=True)] == [250, 72]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_spoilt_steps_files_and_refusals(found: dict[str, Any], dtype: str) -> None:
    report = found[dtype]
    no_group, few_keys = report.pop("refusals")
    assert "first.values is spread over 2 ranks and model_group has 1" in no_group
    assert "n_subkeys=1" in few_keys and "at least 2" in few_keys
    assert report == {
        "dtypes": [f"torch.{dtype}"],
        "spoilt": True,
        "unchanged": True,
        "restored": True,
        "resumed": True,
        "replicas_equal": True,
        "files_are_whole": True,
    }
