"""Whole evaluations of a tiny run: the same numbers from any number of processes, gone on with after an end."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SMALL = (
    "evaluation.sequences=6", "evaluation.streams=2", "evaluation.gate_tokens=64", "evaluation.needles.samples=4",
    "evaluation.needles.lengths=[192]", "evaluation.needles.iterations=[0,2]", "evaluation.needles.needles=2",
    "evaluation.needles.batch=2",
)  # fmt: skip


def evaluate(job: TinyJob, *arguments: str, expected: int = 0) -> str:
    """Run launch/evaluate.py on the job's run to its end; returns what it printed."""
    script = str(ROOT / "launch" / "evaluate.py")
    process = job.start(sys.executable, script, "--run", str(job.folder / "run"), *SMALL, *arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expected, output
    return output


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, whole_run: TinyJob) -> Iterator[Path]:
    """A folder with a copy of the whole run, measured by two processes."""
    from tests.distributed.conftest import TinyJob

    job = TinyJob(tmp_path_factory.mktemp("measured"), tiny_data)
    job.begin_from(whole_run, 24)
    shutil.copy(job.folder / "run" / "summary.json", job.folder / "trained.json")
    output = evaluate(job, "parallel.processes=2")
    assert "perplexity, memory reset per document" in output and "needles, protocol aligned" in output
    yield job.folder
    job.end()


@pytest.fixture
def job(measured: Path, tiny_job: TinyJob) -> TinyJob:
    """A job with a copy of the measured run."""
    shutil.copytree(measured, tiny_job.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tiny.yaml"))
    return tiny_job


def pieces(job: TinyJob) -> dict[str, Any]:
    lines = (job.folder / "run" / "evaluation" / "pieces.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["key"] for record in records}) == len(records)
    return {record["key"]: record["result"] for record in records}


def assert_close(one: Any, other: Any) -> None:
    """Equal, numbers to 1e-9 of each other."""
    if isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-9)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    else:
        assert one == other


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_process_measures_what_two_measure(job: TinyJob) -> None:
    checkpoints = content(job.folder / "run" / "checkpoints")
    found = pieces(job)
    assert len(found) == 3 * 2 + 2 * 2
    shutil.rmtree(job.folder / "run" / "evaluation")
    evaluate(job, "parallel.processes=1")
    assert_close(found, pieces(job))
    assert content(job.folder / "run" / "checkpoints") == checkpoints


def test_done_pieces_are_reused_and_the_summary_is_added_to(job: TinyJob) -> None:
    run = job.folder / "run"
    first = pieces(job)
    lines = (run / "evaluation" / "pieces.jsonl").read_text().splitlines(keepends=True)
    # As after a kill in the middle of a line.
    (run / "evaluation" / "pieces.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    output = evaluate(job)
    assert f"measured 4/{len(first)} pieces" in output
    assert pieces(job) == first
    summary = json.loads((run / "summary.json").read_text())
    found = summary.pop("evaluation")
    assert summary == json.loads((job.folder / "trained.json").read_text())
    assert found["perplexity"]["memory on"]["tokens"] == 6 * 64
    assert [row["readings"] for row in found["needles"]["run"]] == [0, 2]
    names = {Path(path).name for path in found["pictures"]}
    assert names == {"loss.png", "perplexity_by_position.png", "needles.png", "gates.png"}
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in found["pictures"])


def test_official_protocol_and_a_twin(job: TinyJob) -> None:
    plain = job.folder / "plain"
    job.train_ranks("training.steps=3", "model.memory_layers=[]", f"run_directory={plain}", "name=plain")
    output = evaluate(job, "--against", str(plain), "evaluation.needles.protocol=official")
    assert "twin plain" in output and "needles, protocol official" in output
    summary = json.loads((job.folder / "run" / "summary.json").read_text())["evaluation"]
    assert set(summary["perplexity"]) == {"memory on", "memory reads off", "memory reset per document", "twin"}
    assert summary["perplexity"]["memory on"]["value"] != summary["perplexity"]["memory reads off"]["value"]
    assert [row["readings"] for row in summary["needles"]["twin"]] == [0]


def test_what_can_not_be_measured_is_said_in_one_line(job: TinyJob) -> None:
    run, other = job.folder / "run", job.folder / "other"
    output = evaluate(job, "model.window=3", "parallel.processes=1", expected=2)
    assert "describe what was trained" in output and "Traceback" not in output
    shutil.copytree(run, other)
    checkpoint = next((other / "checkpoints").glob("step_*"))
    state = json.loads((checkpoint / "job.json").read_text())
    state["corpus"]["corpus"] = "another"
    (checkpoint / "job.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = (checkpoint / "job.json").read_bytes()
    manifest["job.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    output = evaluate(job, "--against", str(other), "parallel.processes=2", expected=2)
    assert "another corpus or tokenizer" in output and "Traceback" not in output
    tensors = next((run / "checkpoints").rglob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    output = evaluate(job, "parallel.processes=1", expected=2)
    assert "is damaged" in output and "Traceback" not in output
