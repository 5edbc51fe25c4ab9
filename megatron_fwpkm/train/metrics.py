"""Recording: metrics.jsonl with every step, TensorBoard with some."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsWriter:
    """Writes a run's metrics; only rank 0 has one.

    Tags are grouped: train/, time/, memory/block_<i>/, evaluation/. After a resume, records of steps that will be
    made again are dropped from metrics.jsonl and hidden in TensorBoard.
    """

    def __init__(self, run_directory: Path, resumed_step: int, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._every = every
        self.path = run_directory / "metrics.jsonl"
        self.tensorboard_directory = run_directory / "tensorboard"
        _drop_after(self.path, resumed_step)
        self._file = self.path.open("a")
        self._tensorboard: Any = SummaryWriter(str(self.tensorboard_directory), purge_step=resumed_step + 1)

    def write(self, step: int, values: Mapping[str, float], always: bool = False) -> None:
        """Record grouped values of one step; TensorBoard gets them every so many steps, or `always`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if always or step % self._every == 0 or step == 1:
            for tag, value in values.items():
                self._tensorboard.add_scalar(tag, value, step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All records of a metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _drop_after(path: Path, step: int) -> None:
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= step]
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.replace(path)
