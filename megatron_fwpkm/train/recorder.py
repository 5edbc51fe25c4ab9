"""What a job leaves to look at while it runs: console, logs, metrics, samples. Rank 0's; silent elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron_fwpkm.config import TrainConfig, to_yaml
from megatron_fwpkm.evaluate.perplexity import HeldOutLoss
from megatron_fwpkm.train.display import Display, StepLine, perplexity
from megatron_fwpkm.train.logs import TrainLog
from megatron_fwpkm.train.metrics import MetricsWriter
from megatron_fwpkm.train.samples import Sampler
from megatron_fwpkm.train.step import StepResult


@dataclass(frozen=True)
class StepRecord:
    """A finished step and where the job stands after it."""

    step: int
    result: StepResult
    learning_rate: float
    seconds: float
    tokens: int
    skipped_steps: int
    tokens_per_second: float
    """Mean since this start."""
    seconds_left: float
    flops_per_token: int
    peak_flops: float
    """Of all processes."""


class Recorder(AbstractContextManager["Recorder"]):
    """Rank 0's records; on other ranks nothing happens.

    A write that fails (a full disk) must not stop one rank in the middle of a step while the others wait for it: the
    first failure is kept, nothing more is written, and the job asks `failed` and calls check() where all ranks agree.
    """

    def __init__(self, config: TrainConfig, active: bool) -> None:
        self._config = config
        self._active = active
        self._run_directory = Path(config.run_directory)
        self._failure: OSError | None = None
        self._log: TrainLog | None = None
        self._metrics: MetricsWriter | None = None
        self._display = Display(False, config.logging.every, config.training.steps, 0)
        self._opened = ExitStack()
        self.sampler: Sampler | None = None

    def open(self, resumed_step: int) -> None:
        """Open the files and start the display. Raises OSError."""
        if not self._active:
            return
        config = self._config
        self._log = TrainLog(self._run_directory)
        self._metrics = MetricsWriter(self._run_directory, resumed_step, config.logging.every, to_yaml(config))
        self._display = self._opened.enter_context(
            Display(True, config.logging.every, config.training.steps, resumed_step, self._write_log)
        )

    @property
    def failed(self) -> bool:
        """Whether a write has failed; `check` says which."""
        return self._failure is not None

    def check(self) -> None:
        """Bring everything to the files. Raises the first failure."""
        self._attempt(lambda: self._metrics.flush() if self._metrics is not None else None)
        if self._failure is not None:
            raise self._failure

    def say(self, line: str) -> None:
        """Show and log a line."""
        self._display.say(line)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Show and log names and values at the end."""
        self._display.table(title, rows)

    def step(self, record: StepRecord) -> None:
        """Record and show a finished step."""
        if not self._active:
            return
        result, speed = record.result, record.result.tokens / record.seconds
        mfu_per_speed = record.flops_per_token / record.peak_flops
        parts = result.times.seconds
        values = {
            "train/loss": result.loss,
            "train/perplexity": perplexity(result.loss),
            "train/learning_rate": record.learning_rate,
            "train/gradient_norm": result.gradient_norm,
            "train/tokens": record.tokens,
            "train/skipped_steps": record.skipped_steps,
            "train/limited_attention": float(result.limited_attention),
            "speed/tokens_per_second": speed,
            "speed/mfu": mfu_per_speed * speed,
            "speed/step_seconds": record.seconds,
            **{f"speed/{part}_seconds": seconds for part, seconds in parts.items()},
            "speed/other_seconds": record.seconds - sum(parts.values()),
            **result.memory,
        }
        histograms: dict[str, list[float]] = getattr(result, "histograms", {})
        self._write_metrics(record.step, values, histograms)
        note = "" if result.applied else "not finite: step skipped, memories rolled back"
        line = StepLine(
            result.loss, record.tokens_per_second, record.seconds_left, mfu_per_speed * record.tokens_per_second, note
        )
        self._display.step(record.step, line)

    def evaluation(self, step: int, result: HeldOutLoss, seconds: float) -> None:
        """Record and show a measurement, and continue the sampler's prompts.

        All ranks call this together: those that have a sampler continue prompts together.
        """
        continued = None if self.sampler is None else self.sampler.continue_prompts()
        if not self._active:
            return
        with_reads, without_reads = perplexity(result.with_reads), perplexity(result.without_reads)
        values = {
            "evaluation/loss": result.with_reads,
            "evaluation/perplexity": with_reads,
            "evaluation/perplexity_without_reads": without_reads,
            "evaluation/seconds": seconds,
        }
        self._write_metrics(step, values, {}, always=True)
        self.say(
            f"held-out perplexity {with_reads:.3f}, without memory reads {without_reads:.3f}  "
            f"({result.tokens:,} tokens in {seconds:.0f} s)"
        )
        if self.sampler is not None and continued is not None:
            sampler, rows = self.sampler, continued
            self._attempt(lambda: sampler.write(self._run_directory / "samples", step, rows))

    def _write_metrics(
        self, step: int, values: dict[str, float], histograms: dict[str, list[float]], always: bool = False
    ) -> None:
        if self._metrics is not None:
            metrics = self._metrics
            self._attempt(lambda: metrics.write(step, values, histograms, always))

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            log = self._log
            self._attempt(lambda: log.write(text))

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._failure is None:
            try:
                action()
            except OSError as error:
                self._failure = error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()
        for file in (self._metrics, self._log):
            if file is not None:
                try:
                    file.close()
                except OSError as failure:  # what was to be kept has been checked before
                    self._failure = self._failure or failure
