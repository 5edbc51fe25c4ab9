"""One optimizer step: microbatches, the engine's update, the tables' update, and the fate of what memories wrote."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.errors import SharedUserError
from megatron_fwpkm.model.decoder import BlockStack, memory_statistics
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors, largest_over_ranks, sum_over_ranks
from megatron_fwpkm.phase import PHASE
from megatron_fwpkm.train.engine import EngineBundle
from megatron_fwpkm.train.exchange_metrics import traffic_statistics
from megatron_fwpkm.train.optimizer import set_learning_rate
from megatron_fwpkm.train.schedule import limits_attention
from megatron_fwpkm.train.settings import TrainingConfig

Part = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A microbatch's part of the step's loss, and the statistics of its memories."""


_WORDS = {
    "data": "reading the data of",
    "forward": "in the forward pass of",
    "backward": "in the backward pass of",
    "update": "in the update of",
}
"""The parts of a step whose time is measured."""


class Microbatches(Protocol):
    """What a step reads from: a loader, or any iterator of microbatches."""

    def __next__(self) -> TokenBatch: ...


@dataclass
class StepTimes:
    """Seconds that this rank spent in the parts of one step."""

    step: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_WORDS, 0.0))

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time inside to one part, which is this process's phase meanwhile."""
        started = time.perf_counter()
        with PHASE.during(f"{_WORDS[part]} step {self.step}"):
            yield
        self.seconds[part] += time.perf_counter() - started


@dataclass(frozen=True)
class StepResult:
    """What one step did; all but the times is the same on all ranks.

    The loss is the mean over the counted labels of the global batch; statistics and histograms are means over all
    ranks and microbatches.
    """

    applied: bool
    """False if the step was not finite and was undone."""
    loss: float
    gradient_norm: float
    """Global norm before clipping, the trained tables included; infinite where DeepSpeed found it not finite."""
    tokens: int
    """Tokens read by all ranks."""
    labels: int
    """Labels of all ranks that count in the loss."""
    limited_attention: bool
    """Whether full attention was limited to the sliding window in this step."""
    stop_requested: bool
    memory: dict[str, float]
    """"memory/block_<i>/<name>" -> value, and of memories over several ranks what exchange_metrics.py tells."""
    histograms: dict[str, list[float]]
    """"memory/block_<i>/<name>" -> values, of statistics with more than one number."""
    times: StepTimes


class Stepper:
    """Makes optimizer steps.

    Args:
        bundle: engine and trained tables of the model
        model: the decoder inside the engine
        loader: gives this rank's next microbatch
        training: accumulation and probability of limited attention
        seed: of the draw that limits attention
        topology: this rank among all
    """

    def __init__(
        self,
        bundle: EngineBundle,
        model: BlockStack,
        loader: Microbatches,
        *,
        training: TrainingConfig,
        seed: int,
        topology: Topology,
    ) -> None:
        self._engine, self._tables = bundle.engine, bundle.tables
        self._model = model
        self._loader = loader
        self._training = training
        self._seed = seed
        self._topology = topology
        self._device: torch.device = bundle.engine.device
        self._reports: dict[str, _Report] | None = None
        self._peaks: list[str] = []

    def run(self, step: int, learning_rate: float, stop_requested: Callable[[], bool]) -> StepResult:
        """Make step `step` (from 1). If loss, memory or gradients are not finite on any rank, no rank changes anything.

        `stop_requested` tells whether this rank was asked to stop, at the end of the step; the result whether any was.
        Raises SharedUserError when the global batch has no counted label or a rank could not read its share; nothing
        is changed then.
        """
        with PHASE.during(f"exchanging numbers in step {step}"):
            return self._run(step, learning_rate, stop_requested)

    def _run(self, step: int, learning_rate: float, stop_requested: Callable[[], bool]) -> StepResult:
        times = StepTimes(step)
        batches, labels = self._read_batches(step, times)
        limited = limits_attention(self._seed, step, self._training.sliding_probability)
        set_learning_rate(self._engine.optimizer, learning_rate)
        states = [state for _, state in self._model.fast_states()]
        self._tables.begin_step()
        for state in states:
            state.begin_step()
        self._model.limit_full_attention = limited
        traffic_statistics(self._model, 1)  # what was sent since the last step, for measurements, is not this one's
        try:
            parts = self._microbatches(batches, labels, times)
        finally:
            self._model.limit_full_attention = False
        applied, norm = bool(self._engine.was_step_applied()), self._engine.get_global_grad_norm()
        norm = torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float64, device=self._device)
        with times.measure("update"):
            if applied:
                self._tables.apply(learning_rate, norm)
            else:
                self._tables.discard()
        for state in states:
            if applied:
                state.commit_step()
            else:
                state.rollback_step()
        tokens = sum(batch.tokens_BT.numel() for batch in batches)
        traffic = traffic_statistics(self._model, tokens / self._topology.tensor_ranks)
        loss, gradient_norm, stops, statistics = self._share(parts, traffic, norm, stop_requested())
        return StepResult(
            applied=applied,
            loss=loss,
            gradient_norm=gradient_norm,
            tokens=tokens * self._topology.replicas,
            labels=labels,
            limited_attention=limited,
            stop_requested=stops > 0,
            memory={name: values[0] for name, values in statistics.items() if len(values) == 1},
            histograms={name: values for name, values in statistics.items() if len(values) > 1},
            times=times,
        )

    def _read_batches(self, step: int, times: StepTimes) -> tuple[list[TokenBatch], int]:
        """This rank's microbatches, and the number of counted labels on all ranks together.

        The one exchange before the forward passes: every gradient is divided by that number. It also tells of a rank
        that could not read, so that the others don't wait for it.
        """
        batches: list[TokenBatch] = []
        failure: Exception | None = None
        with times.measure("data"):
            try:
                batches = [next(self._loader) for _ in range(self._training.gradient_accumulation)]
            except Exception as error:
                failure = error
        own = sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for batch in batches) * self._topology.leads_replica
        shared = torch.tensor([own, failure is not None], dtype=torch.float64, device=self._device)
        labels, failures = sum_over_ranks(shared).tolist()

        def confess() -> None:
            if failure is not None:
                raise failure

        if failures:
            agree_on_errors(confess, f"reading the data of step {step}")
        if labels == 0:
            raise SharedUserError(
                f"step {step} has no label that counts in the loss: all labels of its global batch are ignored; check "
                "the data, or raise training.micro_batch_size or training.gradient_accumulation"
            )
        return batches, int(labels)

    def _microbatches(self, batches: list[TokenBatch], labels: int, times: StepTimes) -> list[Part]:
        """Forward and backward of all microbatches, and the engine's update."""
        return [self._microbatch(batch, labels, times) for batch in batches]

    def _microbatch(self, batch: TokenBatch, labels: int, times: StepTimes) -> Part:
        """Forward and backward; the last one of a step updates. Returns its part of the step's loss, and statistics."""
        batch = batch.to(self._device)
        documents = {"documents_BT": batch.documents_BT, "positions_BT": batch.positions_BT}
        given = {name: tensor for name, tensor in documents.items() if tensor is not None}
        with times.measure("forward"):
            loss = self._engine(batch.tokens_BT, batch.labels_BT, **given).sum() / labels
            memory = memory_statistics(self._model)
            # A write may be bad although this loss is not: the rows are read later. A factor of NaN makes the
            # gradients NaN, and the engine, which looks at the norm over all ranks, then skips the step on all.
            finite = torch.stack([torch.isfinite(value).all() for value in (loss.detach(), *memory.values())]).all()
            guarded = loss * torch.where(finite, 1.0, math.nan)
        with times.measure("backward"):
            # The engine averages gradients over the replicas and here does not divide by the accumulation: what is
            # left is the gradient of the sum over all counted labels, divided by their number.
            self._engine.backward(guarded * self._topology.replicas, scale_wrt_gas=False)
        with times.measure("update"):
            self._engine.step()
        return loss.detach(), memory

    def _share(
        self,
        parts: list[Part],
        traffic: tuple[dict[str, float], dict[str, float]],
        norm: torch.Tensor,
        stop_requested: bool,
    ) -> tuple[float, float, float, dict[str, list[float]]]:
        """Loss, gradient norm, ranks asked to stop and statistics, over all ranks, in one reading.

        Of the traffic some statistics are means over ranks like the others, and some the largest of all ranks.
        """
        losses, memories = zip(*parts, strict=True)
        own = {
            name: torch.stack([memory[name].flatten().double() for memory in memories]).mean(0) for name in memories[0]
        }
        means, peaks = traffic
        own |= dict(zip(means, norm.new_tensor(list(means.values())).view(-1, 1), strict=True))
        if self._reports is None:
            self._reports = _agree_on_reports({name: values.numel() for name, values in own.items()})
            self._peaks = list(_agree_on_reports(dict.fromkeys(peaks, 1)))
        reports = [
            own[name] / report.ranks if name in own else norm.new_zeros(report.size)
            for name, report in self._reports.items()
        ]
        total = torch.stack(losses).double().sum() * self._topology.reports_loss
        stop = torch.tensor([float(stop_requested)], dtype=torch.float64, device=self._device)
        norm = norm.view(1) / self._topology.world_size
        shared = sum_over_ranks(torch.cat([total.view(1), stop, norm, *reports]))
        if self._peaks:
            own_peaks = norm.new_tensor([peaks.get(name, 0.0) for name in self._peaks])
            shared = torch.cat([shared, largest_over_ranks(own_peaks)])
        loss, stops, gradient_norm, *numbers = shared.tolist()
        remaining = iter(numbers)
        statistics = {name: list(islice(remaining, report.size)) for name, report in self._reports.items()}
        statistics |= {name: [next(remaining)] for name in self._peaks}
        return loss, gradient_norm, stops, statistics


@dataclass(frozen=True)
class _Report:
    """A statistic: how many numbers it has, and how many ranks report it."""

    size: int
    ranks: int


def _agree_on_reports(own: dict[str, int]) -> dict[str, _Report]:
    """All ranks' statistics, in one order, from the sizes of each rank's: a stage of a pipeline has its own."""
    sizes: list[dict[str, int]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, own)
    ranks = Counter(name for of_rank in sizes for name in of_rank)
    return {name: _Report(size, ranks[name]) for of_rank in sizes for name, size in of_rank.items()}
