"""AdamW over the slow weights, its parameter groups and its learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_NOT_DECAYED = ("bias", "norm")


@dataclass(frozen=True)
class Schedule:
    """Linear warmup, then cosine decay; a function of the step alone, so that resuming needs no state."""

    peak: float
    warmup_steps: int
    steps: int
    final_fraction: float

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return self.peak * (self.final_fraction + (1.0 - self.final_fraction) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed, and those whose name contains "bias" or "norm", which are not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if any(word in name for word in _NOT_DECAYED) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """torch's AdamW: on CPU DeepSpeed's own variants would be compiled first, for over a minute."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon)


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of all parameter groups, through DeepSpeed's wrapper too."""
    for group in optimizer.param_groups:
        group["lr"] = value
