"""Models in pipeline stages: how they start, measure and skip, and rank orders; prints what it found on rank 0.

That they train as one rank does is in the equivalence matrix. pipeline_checks.py <configuration, unused> <check>...
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.evaluate.perplexity import batch_loss, held_out_loss, measuring
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.train.step import StepResult
from tests.distributed.cells import Cell
from tests.distributed.workers.equivalence import (
    CONFIG,
    RATES,
    VOCABULARY,
    Trainer,
    batches,
    model_config,
    prepare,
    states_of,
)

CELL = Cell(pipeline=2, accumulation=3)


class Stage(Trainer):
    """A rank's stage of a model in training."""

    def step(self, number: int) -> StepResult:
        return self.stepper.run(number, RATES[(number - 1) % len(RATES)], lambda: False)

    def weights(self) -> dict[str, Tensor]:
        """By the names that they have in a Decoder."""
        return {self.name(name): value.detach().clone() for name, value in self.model.named_parameters()}

    def everything(self) -> dict[str, Tensor]:
        """Copies of weights and fast states."""
        return {**self.weights(), **states_of(self.model, self.ranks.placement.memory_group)}


def everywhere(value: bool) -> bool:
    return bool(topology.sum_over_ranks(torch.tensor(float(value))).item() == dist.get_world_size())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether on all ranks all tensors are the same bits."""
    return everywhere(
        one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    )


def count_labels(batches: list[TokenBatch]) -> int:
    return sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for batch in batches)


def check_measuring() -> dict[str, Any]:
    """A pipeline starts as one rank does, measures the same, and goes on as if it had not measured."""
    from megatron_fwpkm.train.pipeline_step import pipeline_loss_sum

    stage = Stage(CELL)
    held_out = list(itertools.islice(batches(CELL, 3), 3))
    decoder = Decoder(model_config(CELL), VOCABULARY, TorchBackend(CONFIG.initial_std), CELL.seed)
    prepare(decoder, CELL)
    own, start = stage.weights(), {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    starts_equal = same(own, {name: start[name] for name in own})
    measure = partial(held_out_loss, stage.model, held_out, stage.ranks.reports_loss)
    loss_sum = partial(pipeline_loss_sum, stage.engine)
    first = measure(loss_sum)
    wanted = [mean_loss(decoder, held_out, condition) for condition in ("memory", "reads_off")]
    stage.step(1)
    before = stage.everything()
    second, third = measure(loss_sum), measure(loss_sum)
    unchanged = same(before, stage.everything())
    stage.step(2)
    undisturbed = Stage(CELL)
    undisturbed.step(1)
    undisturbed.step(2)
    return {
        "starts_equal": starts_equal,
        "error": max(abs(a - b) / b for a, b in zip((first.with_reads, first.without_reads), wanted, strict=True)),
        "reads_matter": first.with_reads != first.without_reads,
        "tokens": first.tokens == count_labels(held_out) * stage.ranks.replicas,
        "repeatable": second == third,
        "unchanged": unchanged,
        "undisturbed": same(stage.everything(), undisturbed.everything()),
    }


def mean_loss(decoder: Decoder, batches: list[TokenBatch], condition: Any) -> float:
    """The obvious way."""
    with measuring(decoder, condition):
        losses = [batch_loss(decoder, batch).double().sum() for batch in batches]
    return float(torch.stack(losses).sum()) / count_labels(batches)


def check_not_finite(poison: Callable[[Stage], Callable[[], Any]]) -> dict[str, Any]:
    """A step with one bad microbatch on one stage changes nothing on any."""
    stage = Stage(CELL)
    first = stage.step(1)
    before = stage.everything()
    cure = poison(stage)
    bad = stage.step(2)
    cure()
    unchanged = same(before, stage.everything())
    good = stage.step(3)
    return {
        "applied": [first.applied, bad.applied, good.applied],
        "unchanged": unchanged,
        "changed_later": not same(before, stage.everything()),
        "good": math.isfinite(good.loss) and math.isfinite(good.gradient_norm),
    }


def poison_statistics(stage: Stage) -> Callable[[], Any]:
    """The second microbatch of the first stage's memory reports what is not finite; its output is sound."""
    if stage.ranks.stage:
        return lambda: None
    (_, layer), *_ = stage.model.memory_layers()
    calls = itertools.count()
    sound = layer.statistics

    def statistics() -> dict[str, Tensor]:
        bad = next(calls) == 1
        return {name: value * math.nan if bad else value for name, value in sound().items()}

    layer.statistics = statistics  # type: ignore[method-assign]
    return partial(layer.__dict__.pop, "statistics")


def poison_gradient(stage: Stage) -> Callable[[], Any]:
    """A gradient of the last stage is infinite."""
    if not stage.ranks.stage:
        return lambda: None
    weight = next(weight for name, weight in stage.model.named_parameters() if "mlp.down" in name)
    return weight.register_hook(lambda gradient: gradient * math.inf).remove  # type: ignore[no-untyped-call]


def check_rank_order() -> dict[str, Any]:
    """Four ranks, two stages: DeepSpeed's grid in our order is Megatron's, in its own default order it is refused."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, ProcessTopology

    from megatron_fwpkm.model.pipeline import check_grid

    topology.build_groups(ParallelConfig(pipeline=2, timeout_seconds=60))
    check_grid(PipelineParallelGrid(ProcessTopology(["data", "pipe", "model"], [2, 2, 1])))
    try:
        check_grid(PipelineParallelGrid(ProcessTopology(["pipe", "data", "model"], [2, 2, 1])))
    except RuntimeError as error:
        return {"refused": str(error)}
    return {"refused": ""}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "measuring": check_measuring,
    "bad statistics": partial(check_not_finite, poison_statistics),
    "bad gradient": partial(check_not_finite, poison_gradient),
    "rank order": check_rank_order,
}


def main() -> None:
    names = sys.argv[2:]
    topology.initialize(ParallelConfig(timeout_seconds=60))
    found = {name: CHECKS[name]() for name in names}
    leads = dist.get_rank() == 0
    topology.shut_down()
    if leads:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
