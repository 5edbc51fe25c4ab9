"""What a run's metrics.jsonl says about its training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean

from megatron_fwpkm.train.metrics import read_metrics

LAST_STEPS = 20
"""Steps whose mean loss is the loss at the end."""


@dataclass(frozen=True)
class TrainingRecord:
    """Recorded steps, those that were not finite left out; speeds over all of them, in every start of the run."""

    steps: list[int]
    losses: list[float]
    tokens_per_second: float | None
    tokens_per_step: int | None

    @property
    def first_loss(self) -> float:
        """Loss of the first recorded step, in nats per token; NaN without one."""
        return self.losses[0] if self.losses else math.nan

    @property
    def last_loss(self) -> float:
        """Mean loss of the last LAST_STEPS recorded steps; NaN without one."""
        last = self.losses[-LAST_STEPS:]
        return sum(last) / len(last) if last else math.nan

    def facts(self) -> dict[str, float | int | None]:
        """Values for a summary."""
        return {
            "first_loss": self.first_loss if self.losses else None,
            "last_loss": self.last_loss if self.losses else None,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_step": self.tokens_per_step,
        }


def read_training(directory: Path) -> TrainingRecord:
    """The record of a run directory; empty where nothing was recorded."""
    records = [record for record in read_metrics(directory / "metrics.jsonl") if "train/loss" in record]
    # Steps have equal numbers of tokens: the speed over all of them is the harmonic mean.
    speeds = [value for record in records for name, value in record.items() if name.endswith("/tokens_per_second")]
    usable = [record for record in records if record["train/loss"] is not None and math.isfinite(record["train/loss"])]
    return TrainingRecord(
        [int(record["step"]) for record in usable],
        [record["train/loss"] for record in usable],
        harmonic_mean(speeds) if speeds else None,
        round(records[-1]["train/tokens"] / records[-1]["step"]) if records else None,
    )
