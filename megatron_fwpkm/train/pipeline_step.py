"""Steps and measurements of a model in pipeline stages.

DeepSpeed runs the microbatches of a step in its 1F1B schedule: several are in flight, and each stage gets them in
order, so memories are written in the order of the microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.model.pipeline import Message, PipelineDecoder, message_of
from megatron_fwpkm.phase import PHASE
from megatron_fwpkm.train.step import Part, Stepper, StepTimes

_PARTS_OF_STEP = {
    schedule.LoadMicroBatch: "data",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.ReduceTiedGrads: "update",
    schedule.ReduceGrads: "update",
    schedule.OptimizerStep: "update",
}
"""Where the time of an instruction counts; that of sending and waiting for others is no part's."""


class PipelineStepper(Stepper):
    """As Stepper, for an engine of DeepSpeed's around a PipelineDecoder."""

    _model: PipelineDecoder

    def _microbatches(self, batches: list[TokenBatch], labels: int, times: StepTimes) -> list[Part]:
        # The engine averages gradients over the replicas and divides each by the number of microbatches.
        scale = float(self._topology.replicas * len(batches))
        with self._model.recording(labels, scale) as record, _timed(self._engine, times):
            self._engine.reset_activation_shape()
            self._engine.train_batch(_feed(batches))
        nothing = torch.zeros((), device=self._device)
        losses = record.losses or [nothing] * len(batches)
        return list(zip(losses, record.statistics, strict=True))


def pipeline_loss_sum(engine: Any, batches: Sequence[TokenBatch]) -> torch.Tensor:
    """Sum of the cross entropy of batches of one shape and number of their counted labels, float64 [2].

    The last stage has them, the others zeros. All ranks call this together, with equally many batches.
    """
    engine.reset_activation_shape()
    losses = engine.eval_batch(_feed(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches))
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    if losses is not None:
        total[0] = torch.stack(losses).sum()
        total[1] = sum((batch.labels_BT != IGNORED_LABEL).sum() for batch in batches)
    return total


def _feed(batches: Sequence[TokenBatch]) -> Iterator[tuple[Message, torch.Tensor]]:
    """What the first stage (the message) and the last one (the labels) take."""
    for batch in batches:
        yield message_of(batch.tokens_BT, batch.documents_BT, batch.positions_BT), batch.labels_BT


@contextmanager
def _timed(engine: Any, times: StepTimes) -> Iterator[None]:
    """Within the context the engine's instructions are timed."""

    def timed(action: Callable[..., None], part: str | None) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            waiting = f"exchanging with another stage in step {times.step}"
            with times.measure(part) if part is not None else PHASE.during(waiting):
                action(*arguments, **options)

        return run

    engine._INSTRUCTION_MAP = {
        kind: timed(action, _PARTS_OF_STEP.get(kind)) for kind, action in type(engine)._INSTRUCTION_MAP.items()
    }
    try:
        yield
    finally:
        del engine._INSTRUCTION_MAP
