"""Whole jobs whose layers are split over ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

MODEL = (
    "model.memory_layers=[]",
    "model.key_value_heads=2",
    "model.mixers=[gated_delta_net,full_attention]",
    "training.steps=4",
)
SPLIT = ("parallel.tensor=2", "parallel.sequence_parallel=true", "training.activation_checkpointing=sublayers")


def of_steps(job: TinyJob) -> dict[int, dict[str, float]]:
    """What each step computed."""
    kept = [record for record in job.records() if "train/loss" in record]
    return {r["step"]: {n: v for n, v in r.items() if n.startswith("train/")} for r in kept}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[TinyJob]:
    """A job over two tensor-parallel ranks that divide the tokens."""
    from tests.distributed.conftest import TinyJob

    job = TinyJob(tmp_path_factory.mktemp("split"), tiny_data)
    assert "weights a process" in job.train(*MODEL, *SPLIT)
    yield job
    job.end()


def test_a_split_job_trains_as_one_process_does(tiny_job: TinyJob, split: TinyJob) -> None:
    """Losses, norms and tokens of every step, held-out loss, and what both ranks together say of the prompts."""
    tiny_job.train(*MODEL, "parallel.processes=1")
    wanted, found = of_steps(tiny_job), of_steps(split)
    assert list(found) == [1, 2, 3, 4]
    for step, record in found.items():
        assert record == pytest.approx(wanted[step], rel=2e-5), step
    (whole,), (of_split,) = ([r for r in job.records() if "evaluation/loss" in r] for job in (tiny_job, split))
    assert of_split["evaluation/loss"] == pytest.approx(whole["evaluation/loss"], rel=2e-5)
    name = "run/samples/step_00000004.txt"
    assert (split.folder / name).read_text() == (tiny_job.folder / name).read_text()


def test_a_split_job_resumes_bitwise_in_its_own_layout_only(split: TinyJob) -> None:
    first = of_steps(split)
    shutil.rmtree(split.folder / "run" / "checkpoints" / "step_00000004")
    assert "step 2" in split.train(*MODEL, *SPLIT)
    assert of_steps(split) == first
    refused = split.train(*MODEL, expected=2)
    assert "tensor (2, 1)" in refused and "another layout" in refused
