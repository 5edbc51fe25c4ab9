"""What a model costs: every module answers for its own weights and operations, in these units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights. On a tensor-parallel rank: those of this rank."""

    slow: int = 0
    """Trained by the optimizer."""
    fast: int = 0
    """Written by the forward pass."""
    active_per_token: int = 0
    """Slow and fast ones that computing one token takes: of a table of values only the rows that it reads."""

    def __add__(self, other: ParameterCount) -> ParameterCount:
        return ParameterCount(
            self.slow + other.slow, self.fast + other.fast, self.active_per_token + other.active_per_token
        )


def dense(module: nn.Module) -> ParameterCount:
    """The count of a module all of whose parameters are used for every token."""
    slow = sum(parameter.numel() for parameter in module.parameters())
    return ParameterCount(slow, 0, slow)


def total(counts: Iterable[ParameterCount]) -> ParameterCount:
    """Sum of counts."""
    return sum(counts, ParameterCount())
