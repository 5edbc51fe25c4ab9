"""Training records, the summary file, progress and tables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.evaluate.intervals import wilson
from megatron_fwpkm.evaluate.loading import TrainedRun
from megatron_fwpkm.evaluate.plan import NeedleRow
from megatron_fwpkm.evaluate.report import Findings, Meter, merge_summary, needle_table
from megatron_fwpkm.evaluate.training_record import read_training


def test_training_record_is_that_of_all_finite_steps(tmp_path: Path) -> None:
    records = [
        {"step": 1, "train/loss": 8.0, "train/tokens": 100, "speed/tokens_per_second": 50.0},
        {"step": 2, "train/loss": None, "train/tokens": 200, "speed/tokens_per_second": 100.0},
        {"step": 2, "evaluation/perplexity": 3.0},
        {"step": 3, "train/loss": math.nan, "train/tokens": 300, "speed/tokens_per_second": 100.0},
        {"step": 4, "train/loss": 6.0, "train/tokens": 400, "speed/tokens_per_second": 100.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_training(tmp_path)
    assert (found.steps, found.losses, found.tokens_per_step) == ([1, 4], [8.0, 6.0], 100)
    assert found.tokens_per_second == pytest.approx(400 / (2 + 1 + 1 + 1))
    assert found.facts()["first_loss"] == 8.0 and found.facts()["last_loss"] == 7.0
    empty = read_training(tmp_path / "nowhere")
    assert empty.facts() == dict.fromkeys(("first_loss", "last_loss", "tokens_per_second", "tokens_per_step"))


def test_summary_keeps_what_others_wrote(tmp_path: Path) -> None:
    merge_summary(tmp_path, {"evaluation": {"step": 1}})
    (tmp_path / "summary.json").write_text(json.dumps({"perplexity": 9.5, "evaluation": {"step": 1}}))
    merge_summary(tmp_path, {"evaluation": {"step": 2}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"perplexity": 9.5, "evaluation": {"step": 2}}


def test_progress_in_plain_lines_is_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(active=True) as meter:
        for done in range(201):
            meter.update(done, 200)
        meter.say("[brackets] stay")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("measured 0/200") and 10 <= len(lines) <= 12 and lines[-1] == "[brackets] stay"
    with Meter(active=False) as silent:
        silent.update(1, 2)
    assert capsys.readouterr().out == ""


def test_needle_table_has_a_column_for_each_number_of_readings() -> None:
    def row(readings: int) -> NeedleRow:
        return NeedleRow(1024, readings, 8, wilson(readings, 8), wilson(readings / 2, 8), wilson(readings, 8))

    table = needle_table({"run": [row(0), row(2)], "twin": [row(0)]}, "aligned")
    assert [column.header for column in table.columns] == ["model", "tokens", "right", "0", "2"]
    assert list(table.columns[4].cells)[:2] == ["25 [7, 59]", "12 [2, 47]"]
    assert list(table.columns[4].cells)[2:] == ["", ""]


def test_runs_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    config = load_train_config(Path(__file__).parents[2] / "configs" / "train" / "nano.yaml")
    runs = {
        key: TrainedRun(tmp_path / key, config, tmp_path, 1, 1, {}, key)  # a preset with another run_directory
        for key in ("run", "twin")
    }
    findings = Findings(runs, config, [], {}, [], [], {})
    assert findings.names() == {"run": str(tmp_path / "run"), "twin": str(tmp_path / "twin")}
    plain = config.model_copy(update={"name": "plain"})
    other = Findings({**runs, "twin": replace(runs["twin"], config=plain)}, config, [], {}, [], [], {})
    assert other.names() == {"run": "nano", "twin": "plain"}
