"""Optimizer, trained tables and steps under DeepSpeed ZeRO-1 on gloo ranks, in fp32 and bf16."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

SCRIPT = "optimizer_checks.py"
STAGES = ("train_fp32_0", "train_fp32_2", "train_fp32_3", "train_bf16_2", "train_bf16_3")


def check_replicas(found: dict[str, Any], precision: str) -> None:
    assert found["equal_at_start"] and found["equal_at_end"] and found["changed"]
    assert found["applied"] == [True] * 5
    assert min(found["norms"]) > 0.6  # the clipping at 0.3 acts in every step
    assert len(set(found["labels"])) > 1  # different numbers of labels count in the steps
    assert found["dtypes"] == ["torch.float32" if precision == "fp32" else "torch.bfloat16"]
    assert found["master_dtypes"] == ["torch.float32"]
    assert found["in_partitions"] == found["others"]
    assert found["untouched"] > 0


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """What the checks found in two processes, in one start, and the folder of what they wrote."""
    from tests.distributed.conftest import TinyJob

    folder = tmp_path_factory.mktemp("optimizer")
    job = TinyJob(folder, tiny_data)
    yield job.worker(SCRIPT, str(folder), "train_fp32", "train_bf16", "guards_fp32", "guards_bf16", *STAGES), folder
    job.end()


def test_two_replicas_equal_plain_torch_with_the_whole_batch(checked: tuple[dict[str, Any], Path]) -> None:
    """Loss and gradient over all counted labels, global norm and clipping over everything, touched rows."""
    found = checked[0]["train_fp32"]
    check_replicas(found, "fp32")
    assert found["loss_error"] < 3e-6
    assert found["norm_error"] < 3e-6
    assert found["weight_error"] < 3e-6


@pytest.mark.parametrize("name", STAGES)
def test_tables_train_beside_every_stage(checked: tuple[dict[str, Any], Path], name: str) -> None:
    """Norm and clipping are joint in every stage, whichever way its optimizer asks for the norm."""
    found, first = checked[0][name], checked[0]["train_bf16"]
    assert found["equal_at_start"] and found["equal_at_end"] and found["changed"]
    assert found["applied"] == [True] * 5 and min(found["norms"]) > 0.6
    if "fp32" in name:
        assert max(found["loss_error"], found["norm_error"], found["weight_error"]) < 3e-6
    else:
        assert found["losses"] == pytest.approx(first["losses"], abs=1e-2)
        assert found["norms"] == pytest.approx(first["norms"], rel=1e-2)


def test_two_replicas_equal_one_with_the_whole_batch_in_bf16(
    tiny_job: TinyJob, checked: tuple[dict[str, Any], Path]
) -> None:
    two, folder = checked[0]["train_bf16"], checked[1]
    one = tiny_job.worker(SCRIPT, str(folder), "train_bf16", processes=1)["train_bf16"]
    check_replicas(two, "bf16")
    assert one["labels"] == two["labels"]
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-2)
    assert one["norms"] == pytest.approx(two["norms"], rel=1e-2)
    left, right = (torch.load(folder / f"bf16_{ranks}.pt") for ranks in (1, 2))
    for name in left:
        if "updates_N" not in name and "clock_N" not in name:  # rounding may move a read to another slot
            moment = "moment" in name
            assert float((left[name] - right[name]).norm() / left[name].norm()) < (0.25 if moment else 0.05), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_guards_resume_and_limited_attention(checked: tuple[dict[str, Any], Path], precision: str) -> None:
    found = checked[0][f"guards_{precision}"]
    no_labels, damaged = found.pop("refusals")
    assert all("step 2 has no label that counts" in message for message in no_labels)
    assert damaged == ["the shard is damaged"] * 2
    assert found == {
        "skipped": [False, False],
        "skipped_norms": ["inf", "inf"],
        "unchanged": True,
        "unchanged_by_refusal": True,
        "applied_later": True,
        "resumed": True,
        "same_losses": True,
        "stop": [False, True],
        "draws_agree": True,
        "draws_used": True,
        "draws_replayed": True,
        "documents": True,
        "full_after": True,
    }


def test_a_bf16_job_trains_and_resumes_bitwise(tiny_job: TinyJob) -> None:
    options = ["training.precision=bf16", "training.steps=4", "training.sliding_probability=0.5"]
    tiny_job.train_ranks(*options)
    first = {record["step"]: record for record in tiny_job.records() if "train/loss" in record}
    assert list(first) == [1, 2, 3, 4] and first[4]["train/loss"] < first[1]["train/loss"]
    assert all(0 < record["train/gradient_norm"] < 100 for record in first.values())
    assert {record["train/limited_attention"] for record in first.values()} <= {0.0, 1.0}
    shutil.rmtree(tiny_job.folder / "run" / "checkpoints" / "step_00000004")
    assert "step 2" in tiny_job.train_ranks(*options)
    again = {record["step"]: record for record in tiny_job.records() if "train/loss" in record}
    same = [name for name in first[3] if not name.startswith("speed/")]
    assert len(same) > 8 and all(first[step][name] == again[step][name] for step in (3, 4) for name in same)
