"""One optimizer step: microbatches, the engine's update, and the fate of what the memories wrote."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_fwpkm.data.streaming import TokenLoader
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.topology import sum_over_ranks


@dataclass
class StepTimes:
    """Seconds that this rank spent in the parts of one step."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("data", "forward", "backward", "update"), 0.0)
    )

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time inside to one part."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


@dataclass(frozen=True)
class StepResult:
    """What one step did; loss and statistics are means over all ranks and microbatches, the same on all ranks."""

    applied: bool
    """False if the step was not finite and was undone."""
    loss: float
    gradient_norm: float
    tokens: int
    stop_requested: bool
    memory: dict[str, float]
    """"memory/block_<i>/<name>" -> value."""
    times: StepTimes


class Stepper:
    """Makes optimizer steps on a DeepSpeed engine."""

    def __init__(self, engine: Any, model: Decoder, loader: TokenLoader, accumulation: int, world_size: int) -> None:
        self._engine = engine
        self._model = model
        self._loader = loader
        self._accumulation = accumulation
        self._world_size = world_size
        self._device: torch.device = engine.device

    def run(self, stop_requested: bool) -> StepResult:
        """Make one step. If loss, memory or gradients are not finite on any rank, no rank's weights or memories change.

        `stop_requested` is this rank's; the result has whether any rank was asked.
        """
        times = StepTimes()
        states = [state for _, state in self._model.fast_states()]
        for state in states:
            state.begin_step()
        losses, statistics, tokens = [], [], 0
        for _ in range(self._accumulation):
            loss, memory, count = self._microbatch(times)
            losses.append(loss)
            statistics.append(memory)
            tokens += count
        applied = bool(self._engine.was_step_applied())
        for state in states:
            if applied:
                state.commit_step()
            else:
                state.rollback_step()
        names = list(statistics[0])
        own = [
            torch.stack(losses).mean(),
            *(torch.stack([memory[name] for memory in statistics]).mean() for name in names),
        ]
        shared = torch.stack(
            [value.double() for value in own]
            + [torch.tensor(float(stop_requested), dtype=torch.float64, device=self._device)]
        )
        loss, *means, stops = (sum_over_ranks(shared) / self._world_size).tolist()
        norm = self._engine.get_global_grad_norm()
        return StepResult(
            applied=applied,
            loss=loss,
            gradient_norm=float(norm) if norm is not None else math.nan,
            tokens=tokens * self._world_size,
            stop_requested=stops > 0,
            memory=dict(zip(names, means, strict=True)),
            times=times,
        )

    def _microbatch(self, times: StepTimes) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        with times.measure("data"):
            batch = next(self._loader).to(self._device)
        with times.measure("forward"):
            loss = self._engine(batch.tokens_BT, batch.labels_BT).mean()
            memory = memory_statistics(self._model)
            # A write may be bad although this loss is not: the rows are read later. A factor of NaN makes the
            # gradients NaN, and the engine, which looks at the norm over all ranks, then skips the step on all.
            finite = torch.stack([torch.isfinite(value) for value in (loss.detach(), *memory.values())]).all()
            guarded = loss * torch.where(finite, 1.0, math.nan)
        with times.measure("backward"):
            self._engine.backward(guarded)
        with times.measure("update"):
            self._engine.step()
        return loss.detach(), memory, batch.tokens_BT.numel()


def memory_statistics(model: Decoder) -> dict[str, torch.Tensor]:
    """Scalar statistics of the last forward pass of every memory layer, by tag."""
    return {
        f"memory/block_{index}/{name}": value.detach().float()
        for index, layer in model.memory_layers()
        for name, value in sorted(layer.statistics().items())
        if value.numel() == 1
    }
