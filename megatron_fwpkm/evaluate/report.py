"""What an evaluation shows: progress, pictures, the summary file and the table at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.table import Table

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.evaluate import pictures
from megatron_fwpkm.evaluate.loading import TrainedRun
from megatron_fwpkm.evaluate.pieces import Piece
from megatron_fwpkm.evaluate.plan import NeedleRow, PositionRow, needle_rows, perplexities
from megatron_fwpkm.evaluate.training_record import TrainingRecord, read_training
from megatron_fwpkm.terminal import ProgressBar, duration, new_console
from megatron_fwpkm.train.run_directory import write_summary

SUMMARY_FILE = "summary.json"
PICTURES_FOLDER = "pictures"
NAMES = {
    ("run", "memory"): "memory on",
    ("run", "reads_off"): "memory reads off",
    ("run", "reset_per_document"): "memory reset per document",
    ("twin", "memory"): "twin",
}
"""Conditions as tables and legends call them."""
_WITHOUT_MEMORY = "as trained"
_PLAIN_SHARE = 0.1  # without a terminal a line at every so much of the work


def _label(findings: Findings, name: str, condition: str) -> str:
    """What tables, legends and the summary call a condition; a run may have no memory to be on."""
    if name == "run" and not findings.runs["run"].config.model.memory_layers:
        return _WITHOUT_MEMORY
    return NAMES[name, condition]


class Meter:
    """Progress on rank 0; on other ranks everything is silent."""

    def __init__(self, active: bool) -> None:
        self.console = new_console(quiet=not active)
        self._bar = ProgressBar(self.console, "measuring")
        self._next_line = 0.0
        self._started = time.perf_counter()

    def say(self, line: str) -> None:
        """Show one line."""
        self.console.print(line, markup=False)

    def update(self, done: int, pieces: int) -> None:
        """Show that so many of so many pieces are done."""
        if self._bar.shown:
            self._bar.update(done, total=pieces)
        elif done >= self._next_line * pieces:
            self._next_line = done / max(pieces, 1) + _PLAIN_SHARE
            self.say(f"measured {done}/{pieces} pieces  {duration(time.perf_counter() - self._started)}")

    def stop(self) -> None:
        """End the progress bar."""
        self._bar.stop()

    def __enter__(self) -> Meter:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(frozen=True)
class Findings:
    """Everything that was measured."""

    runs: Mapping[str, TrainedRun]
    """"run" and perhaps "twin"."""
    config: TrainConfig
    pieces: Sequence[Piece]
    results: Mapping[str, Any]
    edges: Sequence[int]
    gate_text: Sequence[str]
    gates: Mapping[int, Sequence[float]]

    def names(self) -> dict[str, str]:
        """What tables and pictures call the runs: their names, or their directories where two have one name."""
        names = {key: run.config.name for key, run in self.runs.items()}
        alike = len(set(names.values())) < len(names)
        return {key: str(run.directory) if alike else names[key] for key, run in self.runs.items()}

    def perplexities(self) -> dict[str, dict[str, PositionRow]]:
        """By run and condition."""
        chosen = [piece for piece in self.pieces if piece.content["measure"] == "perplexity"]
        return perplexities(chosen, self.results, self.config.evaluation.resamples)

    def needles(self, run: str) -> list[NeedleRow]:
        """Of one run, by length and number of readings."""
        chosen = [piece for piece in self.pieces if piece.content["measure"] == "needles"]
        return needle_rows(chosen, self.results, run)


def report(findings: Findings, meter: Meter) -> None:
    """Draw the pictures, merge the results into summary.json and show the table."""
    run = findings.runs["run"]
    rows = findings.perplexities()
    needles = {name: findings.needles(name) for name in findings.runs}
    trainings = {name: read_training(findings.runs[key].directory) for key, name in findings.names().items()}
    figures = draw(findings, rows, needles["run"], trainings)
    folder, tensorboard = run.directory / PICTURES_FOLDER, run.directory / "tensorboard"
    paths = pictures.save_pictures(figures, folder, tensorboard, run.step)
    summary = {
        "step": run.step,
        "checkpoint": run.checkpoint.name,
        "split": findings.config.evaluation.split,
        "against": str(findings.runs["twin"].directory) if "twin" in findings.runs else None,
        "perplexity": {
            _label(findings, name, condition): {
                **row.whole.to_json(),
                "relative_to_memory_on": row.relative.to_json(),
                "tokens": row.tokens,
                "buckets": [bucket.to_json() for bucket in row.buckets],
            }
            for name, conditions in rows.items()
            for condition, row in conditions.items()
        },
        "bucket_edges": list(findings.edges),
        "needles": {
            "protocol": findings.config.evaluation.needles.protocol,
            **{name: [_needle_json(row) for row in found] for name, found in needles.items()},
        },
        "training": {name: record.facts() for name, record in trainings.items()},
        "pictures": [str(path) for path in paths],
    }
    merge_summary(run.directory, {"evaluation": summary})
    meter.stop()
    meter.console.print(summary_table(findings, rows, trainings, folder))
    if needles["run"]:
        meter.console.print(needle_table(needles, findings.config.evaluation.needles.protocol))


def draw(
    findings: Findings,
    rows: Mapping[str, Mapping[str, PositionRow]],
    needles: Sequence[NeedleRow],
    trainings: Mapping[str, TrainingRecord],
) -> dict[str, Any]:
    """The pictures by name."""
    figures = {}
    if any(record.steps for record in trainings.values()):
        curves = {name: (record.steps, record.losses) for name, record in trainings.items()}
        per_step = next((record.tokens_per_step for record in trainings.values()), None)
        figures["loss"] = pictures.loss_curves(curves, per_step)
    lines = {
        _label(findings, name, condition): row.buckets
        for name, conditions in rows.items()
        for condition, row in conditions.items()
    }
    text = f"{findings.config.evaluation.split} text"
    figures["perplexity_by_position"] = pictures.perplexity_by_position(findings.edges, lines, text)
    if needles:
        figures["needles"] = pictures.needle_accuracy(needles, findings.config.evaluation.needles.protocol)
    if findings.gates:
        figures["gates"] = pictures.gates_over_text(findings.gate_text, findings.gates)
    return figures


def merge_summary(directory: Path, values: Mapping[str, Any]) -> None:
    """Add values to a run's summary.json; what is there under other names stays."""
    path = directory / SUMMARY_FILE
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    write_summary(directory, {**before, **values})


def summary_table(
    findings: Findings,
    rows: Mapping[str, Mapping[str, PositionRow]],
    trainings: Mapping[str, TrainingRecord],
    folder: Path,
) -> Table:
    """The table at the end."""
    run = findings.runs["run"]
    title = f"{run.config.name}, step {run.step}: {findings.config.evaluation.split} text"
    table = Table(title=title, show_header=False, title_justify="left")
    for name, record in trainings.items():
        if record.losses:
            table.add_row(f"training loss, {name}", f"{record.first_loss:.4f} -> {record.last_loss:.4f}")
    for name, conditions in rows.items():
        for condition, row in conditions.items():
            label = _label(findings, name, condition)
            if name == "twin":
                label += f" {findings.names()['twin']}"
            first = _label(findings, "run", "memory")
            compared = "" if (name, condition) == ("run", "memory") else f", x {row.relative.text(4)} of {first}"
            table.add_row(f"perplexity, {label}", row.whole.text() + compared)
    for name, record in trainings.items():
        if record.tokens_per_second:
            table.add_row(f"training speed, {name}", f"{record.tokens_per_second:,.0f} tokens/s")
    table.add_row("run directory", str(run.directory))
    table.add_row("pictures", str(folder))
    table.add_row("TensorBoard", f"tensorboard --logdir {run.directory / 'tensorboard'}")
    return table


def needle_table(needles: Mapping[str, Sequence[NeedleRow]], protocol: str) -> Table:
    """Accuracy by length, one column for each number of readings."""
    samples = needles["run"][0].samples
    title = (
        f"needles, protocol {protocol}, {samples} haystacks a length: % right [95 %] after readings before the question"
    )
    table = Table(title=title, title_justify="left")
    iterations = sorted({row.readings for row in needles["run"]})
    for heading in ("model", "tokens", "right"):
        table.add_column(heading)
    for readings in iterations:
        table.add_column(str(readings), justify="right")
    for name, rows in needles.items():
        for length in sorted({row.length for row in rows}):
            own = {row.readings: row for row in rows if row.length == length}
            for right in ("exact", "digits"):
                shares = [_percent(getattr(own[n], right)) if n in own else "" for n in iterations]
                table.add_row(name, f"{length:,}", right, *shares)
    return table


def _percent(estimate: Any) -> str:
    return f"{100 * estimate.value:.0f} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _needle_json(row: NeedleRow) -> dict[str, Any]:
    return {
        "length": row.length,
        "readings": row.readings,
        "samples": row.samples,
        "exact": row.exact.to_json(),
        "digits": row.digits.to_json(),
        "candidate": row.candidate.to_json(),
    }
