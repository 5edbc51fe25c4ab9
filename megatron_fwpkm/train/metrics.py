"""Recording: metrics.jsonl with every step, TensorBoard with some."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_fwpkm.files import strict_json, write_atomically

_MEMORY = r"memory/block_\d+/"
_SPREAD = r"(memory|pkm)/block_\d+/traffic/"
_CHARTS = {
    "1 loss": {"training and held-out": ["train/loss", "evaluation/loss.*"], "gradient norm": ["train/gradient_norm"]},
    "2 speed": {"tokens/s": ["speed/tokens_per_second"], "parts of a step, s": ["speed/.*_seconds"]},
    "3 memory": {
        "gate mean": [f"{_MEMORY}gate_mean"],
        "memory loss": [f"{_MEMORY}memory_loss"],
        "addressing loss": [f"{_MEMORY}addressing_loss"],
        "coverage": [f"{_MEMORY}coverage"],
        "collisions": [f"{_MEMORY}collision_ratio"],
        "KL to uniform use": [f"{_MEMORY}kl_to_uniform"],
    },
    "4 exchange": {
        "bytes sent for a token": [f"{_SPREAD}.*_bytes"],
        "messages of a rank": [f"{_SPREAD}.*_messages"],
        "imbalance of owners": [f"{_SPREAD}imbalance"],
        "distinct rows / reads": [f"{_SPREAD}distinct_ratio"],
    },
}
"""TensorBoard's page of chosen charts ("custom scalars"): all layers of one quantity in one chart."""


class MetricsWriter:
    """Writes a run's metrics; only rank 0 has one.

    Tags are grouped: train/, speed/, memory/block_<i>/, evaluation/. After a resume, records of steps that will be
    made again are dropped from metrics.jsonl and hidden in TensorBoard. Raises OSError when a write fails; for
    TensorBoard, which writes from a thread, at a later call.
    """

    def __init__(self, run_directory: Path, resumed_step: int, every: int, configuration: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._every = every
        self.path = run_directory / "metrics.jsonl"
        self.tensorboard_directory = run_directory / "tensorboard"
        _drop_after(self.path, resumed_step)
        self._file = self.path.open("a")
        self._tensorboard: Any = SummaryWriter(str(self.tensorboard_directory), purge_step=resumed_step + 1)
        if resumed_step == 0:
            self._tensorboard.add_custom_scalars(
                {
                    group: {name: ["Multiline", tags] for name, tags in charts.items()}
                    for group, charts in _CHARTS.items()
                }
            )
        text = "".join(f"    {line}\n" for line in configuration.splitlines())  # indented: a code block
        self._tensorboard.add_text("configuration", text, resumed_step)

    def is_due(self, step: int) -> bool:
        """Whether TensorBoard gets the values of this step."""
        return step % self._every == 0 or step == 1

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]] | None = None,
        always: bool = False,
    ) -> None:
        """Record grouped values of one step; TensorBoard and histograms every so many steps, or `always`.

        A histogram is a list of bin counts (or shares); the last part of its tag says which bins, see `bin_edges`.
        """
        chosen = always or self.is_due(step)
        counts = {tag: list(bins) for tag, bins in (histograms or {}).items()} if chosen else {}
        self._file.write(strict_json({"step": step, **values, **counts}) + "\n")
        self._file.flush()
        if chosen:
            for tag, value in values.items():
                self._tensorboard.add_scalar(tag, value, step)
            for tag, bins in counts.items():
                self._add_histogram(tag, bins, step)

    def _add_histogram(self, tag: str, bins: list[float], step: int) -> None:
        edges = bin_edges(tag, len(bins))
        middles = [(left + right) / 2 for left, right in itertools.pairwise(edges)]
        self._tensorboard.add_histogram_raw(
            tag,
            min=edges[0],
            max=edges[-1],
            num=sum(bins),
            sum=sum(count * middle for count, middle in zip(bins, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(bins, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=bins,
            global_step=step,
        )

    def flush(self) -> None:
        """Bring everything to the files."""
        self._file.flush()
        self._tensorboard.flush()

    def close(self) -> None:
        """Write what is left and close the files; raises OSError if that fails, the files are closed anyway."""
        try:
            self._file.close()
        finally:
            self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise


def bin_edges(tag: str, bins: int) -> list[float]:
    """Edges of a histogram's bins: gates lie in equal parts of [0, 1], reads a slot in 1, 2-3, 4-7, ..., others count.

    See memory/statistics.py, which makes them.
    """
    name = tag.rsplit("/", 1)[-1]
    if name == "gate_histogram":
        return [index / bins for index in range(bins + 1)]
    if name == "reads_histogram":
        return [float(2**index) for index in range(bins + 1)]
    return [float(index) for index in range(bins + 1)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; damaged lines, such as a last one cut short by a crash, are left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _drop_after(path: Path, step: int) -> None:
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= step]
    write_atomically(path, "".join(strict_json(record) + "\n" for record in kept))
