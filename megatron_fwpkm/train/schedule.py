"""What changes with the step number: the learning rate, and the draw that limits attention in some steps.

Pure functions of the step: resuming needs no state, and all ranks agree without talking.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from megatron_fwpkm.train.settings import OptimizerConfig

Shape = Literal["cosine", "linear", "1-sqrt"]


@dataclass(frozen=True)
class Schedule:
    """Linear warmup, a stable phase at the peak, then decay to `final_fraction` of the peak at the last step.

    Without `decay_steps` everything after the warmup is decay: with the cosine shape the usual cosine schedule, else
    WSD (warmup, stable, decay). Raises ValueError when the phases don't fit into the steps.
    """

    peak: float
    warmup_steps: int
    steps: int
    final_fraction: float
    decay_steps: int | None = None
    shape: Shape = "cosine"

    def __post_init__(self) -> None:
        decay_steps = self.decay_steps if self.decay_steps is not None else 1
        if decay_steps < 1 or self.warmup_steps + decay_steps > self.steps:
            raise ValueError(
                f"{self.warmup_steps} steps of warmup and {decay_steps} of decay don't fit into {self.steps} steps"
            )

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        decay_steps = self.steps - self.warmup_steps if self.decay_steps is None else self.decay_steps
        progress = min(1.0, max(0.0, (step - (self.steps - decay_steps)) / decay_steps))
        return self.peak * (self.final_fraction + (1.0 - self.final_fraction) * _remaining(self.shape, progress))


def _remaining(shape: Shape, progress: float) -> float:
    """Share of the way from the final rate to the peak that is left: 1 at progress 0, 0 at progress 1."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (progress if shape == "linear" else math.sqrt(progress))


def build_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """The configured schedule over `steps` optimizer steps. Raises ValueError when its phases don't fit."""
    common = (config.learning_rate, config.warmup_steps, steps, config.final_fraction)
    if config.schedule == "cosine":
        return Schedule(*common)
    return Schedule(*common, decay_steps=max(1, round(config.wsd_decay_fraction * steps)), shape=config.wsd_decay_shape)


def limits_attention(seed: int, step: int, probability: float) -> bool:
    """Whether full attention is limited to the sliding window in a step: true with the given probability.

    The draw is a hash of seed and step: the same on all ranks, and again after a resume.
    """
    digest = hashlib.sha256(f"{seed}/{step}/limited attention".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < probability
