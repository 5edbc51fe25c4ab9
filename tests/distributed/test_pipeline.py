"""Models in pipeline stages: the same as one rank computes, and whole jobs of two stages."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import differing, whole_tensors
from tests.distributed.conftest import TIMEOUT_SECONDS, TinyJob

pytestmark = pytest.mark.distributed
SCRIPT = "pipeline_checks.py"
FAULTY = str(Path(__file__).parent / "workers" / "faulty_job.py")
STAGES = (
    *("parallel.pipeline=2", "training.gradient_accumulation=3", "evaluation.every=3", "model.layers=3"),
    *("model.memory_layers=[0,2]", "model.pkm_layers=[1]", "optimizer.gradient_clipping=0.5"),
    "model.pkm={heads: 1, topk: 2, n_subkeys: 16, k_dim: 16, v_dim: 16}",
)
NOT_FINITE = {"applied": [True, False, True], "unchanged": True, "changed_later": True, "good": True}


def test_stages_start_and_measure_as_one_rank_and_guard_their_memories(tiny_job: TinyJob) -> None:
    """Measuring changes nothing; a step with one bad microbatch on one stage changes nothing on any."""
    found = tiny_job.worker(SCRIPT, "measuring", "bad statistics", "bad gradient")
    measured = found["measuring"]
    assert measured.pop("error") < 2e-6
    assert all(measured.values()) and len(measured) == 6
    assert found["bad statistics"] == NOT_FINITE
    assert found["bad gradient"] == NOT_FINITE


def test_crossed_rank_orders_are_refused(tiny_job: TinyJob) -> None:
    """They would train, and wrongly. The message is that of rank 0."""
    found = tiny_job.worker(SCRIPT, "rank order", processes=4)
    assert (
        "[0, 1] in DeepSpeed's grid and [0, 2] in Megatron-Core: their rank orders differ"
        in (found["rank order"]["refused"])
    )


def numbers(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What must be the same in two runs, step by step and of measurements."""
    return [
        {name: value for name, value in record.items() if not name.startswith("speed/") and "seconds" not in name}
        for record in records
    ]


def same_checkpoint(one: Path, other: Path) -> bool:
    """Whether slow weights, tables and fast states are the same bits."""
    tensors = whole_tensors(one)
    names = {name.removesuffix(".by_slot") for name in tensors}
    assert {"slow/embedding.weight", "slow/blocks.1.mlp.values", "fast_state/memory_00000/block_000/values"} <= names
    return differing(tensors, whole_tensors(other)) == []


@pytest.fixture(scope="module")
def staged_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[TinyJob]:
    """A job of two stages that was never interrupted."""
    job = TinyJob(tmp_path_factory.mktemp("staged"), tiny_data)
    output = job.train(*STAGES)
    assert "no prompts are continued at evaluations: the layers are divided into stages" in output
    yield job
    job.end()


def test_a_job_of_two_stages_trains_and_measures_as_one_process(tiny_job: TinyJob, staged_run: TinyJob) -> None:
    """Three steps and a measurement; later on, rounding may move a read to another slot."""
    core = str(min(os.sched_getaffinity(0)))  # one process on several cores is slow where others use them, too
    alone = ("parallel.pipeline=1", "parallel.processes=1", "training.stop_after_step=3")
    process = tiny_job.start("taskset", "--cpu-list", core, *tiny_job.command(*STAGES, *alone))
    printed, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, printed
    records = numbers(tiny_job.records())
    assert [record["step"] for record in records] == [1, 2, 3, 3]
    for record, staged in zip(records, numbers(staged_run.records()), strict=False):
        assert record.keys() == staged.keys()
        memories = [f"memory/block_{index}/memory_loss" for index in (0, 2)]
        for name in ("train/loss", "train/gradient_norm", "evaluation/loss", *memories):
            assert staged.get(name, 0) == pytest.approx(record.get(name, 0), rel=2e-5), name
        if "train/loss" in record:  # what the tables contribute to the norm counts on every stage
            assert record["train/gradient_norm"] > 0.5 and all(name in record for name in memories)


def test_a_killed_job_of_two_stages_resumes_bitwise(tiny_job: TinyJob, staged_run: TinyJob) -> None:
    process = tiny_job.start(*tiny_job.command(*STAGES))
    tiny_job.wait_for_step(1, process)
    ranks = tiny_job.ranks(process)
    assert len(ranks) == 2
    tiny_job.wait_for_step(3, process)
    for rank in ranks.values():
        rank.kill()
    process.communicate(timeout=150)
    assert process.returncode == 1
    assert "resumed from" in tiny_job.train_ranks(*STAGES)
    found = {(record["step"], len(record)): record for record in numbers(tiny_job.records())}
    assert found == {(record["step"], len(record)): record for record in numbers(staged_run.records())}
    assert [step for step, _ in sorted(found)] == [1, 2, 3, 3, 4, 5, 6, 6]
    last = Path("run", "checkpoints", "step_00000006")
    assert same_checkpoint(staged_run.folder / last, tiny_job.folder / last)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("raise", "rank 1 failed in the forward pass of step "), ("kill", "SIGKILL")],
)
def test_a_rank_that_fails_in_a_pipeline_ends_all(tiny_job: TinyJob, fault: str, words: str) -> None:
    """A stage raises in its third step, or is killed: the others are in the middle of a schedule."""
    process = tiny_job.start(sys.executable, FAULTY, str(tiny_job.config), fault, *STAGES, "training.steps=100000")
    if fault == "kill":
        tiny_job.wait_for_step(2, process)
        tiny_job.ranks(process)[1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert output.count("error: ") == 1 and words in output and "Traceback" not in output, output
