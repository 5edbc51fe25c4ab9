"""The training loop: steps, records, evaluations and checkpoints until the end or a request to stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fwpkm.accounting import ParameterCount
from megatron_fwpkm.checkpoint.store import CheckpointStore, JobState, check_batch
from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.data.batch import Loader, TokenBatch
from megatron_fwpkm.errors import RankFailedError, SharedUserError, UserError
from megatron_fwpkm.evaluate.perplexity import HeldOutLoss, LossSum, held_out_loss
from megatron_fwpkm.model.decoder import BlockStack
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors
from megatron_fwpkm.phase import PHASE
from megatron_fwpkm.train.engine import EngineBundle
from megatron_fwpkm.train.key_check import check_keys
from megatron_fwpkm.train.recorder import Recorder, StepRecord
from megatron_fwpkm.train.schedule import build_schedule
from megatron_fwpkm.train.step import Stepper, StepResult

RECENT_STEPS = 20


@dataclass
class Job:
    """Everything a running job works with."""

    config: TrainConfig
    topology: Topology
    engine_bundle: EngineBundle
    model: BlockStack
    loader: Loader
    held_out: Sequence[TokenBatch]
    store: CheckpointStore
    corpus: dict[str, str]
    """Hashes that tell corpora and tokenizers apart."""
    recorder: Recorder
    layout: dict[str, Any] = field(default_factory=dict)
    """How the ranks divide the work, for checkpoints."""
    parameters: ParameterCount = field(default_factory=ParameterCount)
    """Weights of this rank's part of the model."""
    stepper: type[Stepper] = Stepper
    """What makes the steps."""
    loss_sum: LossSum | None = None
    """What reads held-out batches where the model is a stage of a pipeline."""
    peak_flops: float = float("nan")
    """FLOP/s of all processes' devices together, for MFU."""

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        return self.engine_bundle.engine


@dataclass
class Progress:
    """Where the job stands."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    first_loss: float | None = None
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last applied steps, at most RECENT_STEPS; their mean is the loss at the end."""
    seconds: float = 0.0
    """Time spent in steps since this start."""
    tokens_this_start: int = 0
    stopped_early: bool = False

    @property
    def last_loss(self) -> float | None:
        """Mean loss of the most recent steps."""
        return sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else None

    @property
    def tokens_per_second(self) -> float:
        """Mean speed since this start, all ranks together."""
        return self.tokens_this_start / self.seconds if self.seconds else 0.0


def train(job: Job, progress: Progress, stop_requested: Callable[[], bool]) -> None:
    """Train up to the configured step, or until some rank was asked to stop; saves at the end either way.

    When it returns, or raises what all ranks raise, all checkpoints are written.
    """
    try:
        _train(job, progress, stop_requested)
        job.store.finish()
    except (SharedUserError, RankFailedError):
        with contextlib.suppress(SharedUserError, RankFailedError):  # one is enough
            job.store.finish()
        raise
    finally:
        _tell_of_saves(job)


def _tell_of_saves(job: Job) -> None:
    for report in job.store.take_reports():
        job.recorder.say(str(report))


def _train(job: Job, progress: Progress, stop_requested: Callable[[], bool]) -> None:
    config = job.config
    schedule = build_schedule(config.optimizer, config.training.steps)
    stepper = job.stepper(
        job.engine_bundle,
        job.model,
        job.loader,
        training=config.training,
        seed=config.seed,
        topology=job.topology,
    )
    last_step = min(config.training.steps, config.training.stop_after_step or config.training.steps)
    flops_per_token = job.model.num_flops_per_token(config.data.sequence_length)
    job.model.train()

    def stop() -> bool:
        return stop_requested() or job.recorder.failed or job.store.has_failed

    while progress.step < last_step and not progress.stopped_early:
        started = time.perf_counter()
        rate = schedule.learning_rate(progress.step + 1)
        result = stepper.run(progress.step + 1, rate, stop)
        seconds = time.perf_counter() - started
        _advance(progress, result, seconds)
        if config.parallel.check_keys_every and progress.step % config.parallel.check_keys_every == 0:
            check_keys(job.model, job.topology)
        job.recorder.step(_record(job, progress, result, rate, seconds, flops_per_token))
        if progress.skipped_in_a_row >= config.training.max_skipped_steps:
            raise SharedUserError(
                f"the last {progress.skipped_in_a_row} steps, up to step {progress.step}, were not finite and were "
                "skipped: training has diverged. Lower optimizer.learning_rate or model.memory.learning_rate, or "
                "resume from an older checkpoint (rename the newer ones)"
            )
        progress.stopped_early = result.stop_requested and progress.step < last_step
        ending = progress.stopped_early or progress.step == last_step
        finished = progress.step == config.training.steps  # measured at the end anyway
        due = config.evaluation.every and progress.step % config.evaluation.every == 0
        if due and not finished and not progress.stopped_early:
            evaluate(job, progress)
        _tell_of_saves(job)
        if ending or progress.step % config.checkpoint.every == 0:
            save(job, progress)


def evaluate(job: Job, progress: Progress) -> HeldOutLoss:
    """Measure held-out loss with and without memory reads; record it, show it, continue some prompts."""
    started = time.perf_counter()
    with PHASE.during(f"measuring held-out loss after step {progress.step}"):
        result = held_out_loss(job.model, job.held_out, job.topology.reports_loss, job.loss_sum)
        job.recorder.evaluation(progress.step, result, time.perf_counter() - started)
    return result


def save(job: Job, progress: Progress) -> Path:
    """Begin a checkpoint of the current step. Raises SharedUserError when records or checkpoint can't be written."""
    agree_on_errors(job.recorder.check, "recording the run")
    state = JobState(
        step=progress.step,
        tokens=progress.tokens,
        skipped_steps=progress.skipped_steps,
        first_loss=progress.first_loss,
        recent_losses=progress.recent_losses,
        data_cursor=job.loader.state_dict(),
        corpus=job.corpus,
        layout=job.layout,
        skipped_in_a_row=progress.skipped_in_a_row,
    )
    path = job.store.save(state)
    _tell_of_saves(job)
    return path


def resume(job: Job, source: Path, say: Callable[[str], None]) -> Progress:
    """Restore everything from a whole checkpoint; returns where the job then stands."""
    state = job.store.load(source, say, lambda state: _check_fits(job, state))
    if state.data_cursor:
        agree_on_errors(lambda: job.loader.load_state_dict(state.data_cursor), f"placing the data cursor of {source}")
    return Progress(
        step=state.step,
        tokens=state.tokens,
        skipped_steps=state.skipped_steps,
        skipped_in_a_row=state.skipped_in_a_row,
        first_loss=state.first_loss,
        recent_losses=state.recent_losses,
    )


def _check_fits(job: Job, state: JobState) -> list[str]:
    """Notes for the user. Raises UserError where a checkpoint is not of this training."""
    if state.corpus != {key: job.corpus.get(key) for key in state.corpus}:
        raise UserError(
            "it was trained on another corpus or tokenizer than data.directory holds for this configuration (another "
            "version of Python, say); give the same corpus, or another run_directory to begin anew"
        )
    return check_batch(state.layout, job.layout)


def _advance(progress: Progress, result: StepResult, seconds: float) -> None:
    progress.step += 1
    progress.tokens += result.tokens
    progress.tokens_this_start += result.tokens
    progress.seconds += seconds
    progress.skipped_steps += not result.applied
    progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
    if result.applied:
        if progress.first_loss is None:
            progress.first_loss = result.loss
        progress.recent_losses = [*progress.recent_losses, result.loss][-RECENT_STEPS:]


def _record(
    job: Job, progress: Progress, result: StepResult, rate: float, seconds: float, flops_per_token: int
) -> StepRecord:
    left = (job.config.training.steps - progress.step) * progress.seconds * result.tokens / progress.tokens_this_start
    return StepRecord(
        step=progress.step,
        result=result,
        learning_rate=rate,
        seconds=seconds,
        tokens=progress.tokens,
        skipped_steps=progress.skipped_steps,
        tokens_per_second=progress.tokens_per_second,
        seconds_left=left,
        flops_per_token=flops_per_token,
        peak_flops=job.peak_flops,
    )
