"""The training loop: steps, records, evaluations and checkpoints until the end or a request to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.data.streaming import TokenLoader
from megatron_fwpkm.errors import SharedUserError
from megatron_fwpkm.evaluate.perplexity import HeldOutLoss, held_out_loss
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.topology import Topology
from megatron_fwpkm.train.checkpoint import CheckpointStore, JobState
from megatron_fwpkm.train.display import Display, perplexity
from megatron_fwpkm.train.metrics import MetricsWriter
from megatron_fwpkm.train.optimizer import Schedule, set_learning_rate
from megatron_fwpkm.train.step import Stepper, StepResult

RECENT_STEPS = 20


@dataclass
class Job:
    """Everything a running job works with."""

    config: TrainConfig
    topology: Topology
    engine: Any
    model: Decoder
    loader: TokenLoader
    held_out: Sequence[TokenBatch]
    store: CheckpointStore
    corpus: dict[str, str]
    """Hashes that tell corpora and tokenizers apart."""
    display: Display
    metrics: MetricsWriter | None
    """None on ranks that record nothing."""


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
    """Train up to the configured step, or until some rank was asked to stop; saves at the end either way."""
    config = job.config
    schedule = Schedule(
        peak=config.optimizer.learning_rate,
        warmup_steps=config.optimizer.warmup_steps,
        steps=config.training.steps,
        final_fraction=config.optimizer.final_fraction,
    )
    stepper = Stepper(job.engine, job.model, job.loader, config.training.gradient_accumulation, job.topology.world_size)
    last_step = min(config.training.steps, config.training.stop_after_step or config.training.steps)
    job.model.train()
    while progress.step < last_step and not progress.stopped_early:
        started = time.perf_counter()
        rate = schedule.learning_rate(progress.step + 1)
        set_learning_rate(job.engine.optimizer, rate)
        result = stepper.run(stop_requested())
        _advance(progress, result, time.perf_counter() - started)
        _report_step(job, progress, result, rate, time.perf_counter() - started)
        if progress.skipped_in_a_row >= config.training.max_skipped_steps:
            raise SharedUserError(
                f"the last {progress.skipped_in_a_row} steps, up to step {progress.step}, were not finite and were "
                "skipped: training has diverged. Lower optimizer.learning_rate or model.memory.learning_rate, or "
                "resume from an older checkpoint"
            )
        progress.stopped_early = result.stop_requested and progress.step < last_step
        ending = progress.stopped_early or progress.step == last_step
        finished = progress.step == config.training.steps  # measured at the end anyway
        if config.evaluation.every and progress.step % config.evaluation.every == 0 and not finished:
            evaluate(job, progress)
        if ending or progress.step % config.checkpoint.every == 0:
            save(job, progress)


def evaluate(job: Job, progress: Progress) -> HeldOutLoss:
    """Measure held-out loss with and without memory reads, record and show it."""
    started = time.perf_counter()
    result = held_out_loss(job.model, job.held_out)
    seconds = time.perf_counter() - started
    if job.metrics is not None:
        values = {
            "evaluation/perplexity": perplexity(result.with_reads),
            "evaluation/perplexity_without_reads": perplexity(result.without_reads),
            "evaluation/seconds": seconds,
        }
        job.metrics.write(progress.step, values, always=True)
    job.display.say(
        f"held-out perplexity {perplexity(result.with_reads):.3f}, without memory reads "
        f"{perplexity(result.without_reads):.3f}  ({result.tokens:,} tokens in {seconds:.0f} s)"
    )
    return result


def save(job: Job, progress: Progress) -> Path:
    """Write a checkpoint of the current step."""
    state = JobState(
        step=progress.step,
        tokens=progress.tokens,
        skipped_steps=progress.skipped_steps,
        first_loss=progress.first_loss,
        recent_losses=progress.recent_losses,
        data_cursor=job.loader.state_dict(),
        corpus=job.corpus,
        world_size=job.topology.world_size,
    )
    started = time.perf_counter()
    path = job.store.save(job.engine, job.model, state)
    job.display.say(f"saved {path} ({time.perf_counter() - started:.1f} s)")
    return path


def resume(job: Job, source: Path) -> Progress:
    """Restore everything from a checkpoint."""
    state = job.store.load(source, job.engine, job.model)
    if state.corpus != job.corpus:
        raise SharedUserError(
            f"{source} was trained on another corpus or tokenizer than data.directory holds for this configuration "
            "(another version of Python, say); give the same corpus, or another run_directory to begin anew"
        )
    job.loader.load_state_dict(state.data_cursor)
    return Progress(
        step=state.step,
        tokens=state.tokens,
        skipped_steps=state.skipped_steps,
        first_loss=state.first_loss,
        recent_losses=state.recent_losses,
    )


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


def _report_step(job: Job, progress: Progress, result: StepResult, rate: float, seconds: float) -> None:
    if job.metrics is not None:
        values = {
            "train/loss": result.loss,
            "train/learning_rate": rate,
            "train/gradient_norm": result.gradient_norm,
            "train/tokens": progress.tokens,
            "train/skipped_steps": progress.skipped_steps,
            "time/tokens_per_second": result.tokens / seconds,
            "time/step": seconds,
            **{f"time/{part}": spent for part, spent in result.times.seconds.items()},
            **result.memory,
        }
        job.metrics.write(progress.step, values)
    left = (job.config.training.steps - progress.step) * progress.seconds * result.tokens / progress.tokens_this_start
    note = "" if result.applied else "not finite: step skipped, memories rolled back"
    job.display.step(progress.step, result.loss, progress.tokens_per_second, left, note)
