"""What a person sees: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from megatron_fwpkm.terminal import TERMINAL_FAILED_VARIABLE, ProgressBar, duration, new_console, values_table


@dataclass(frozen=True)
class StepLine:
    """What the display says about a step."""

    loss: float
    tokens_per_second: float
    seconds_left: float
    mfu: float
    note: str = ""

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}  {self.tokens_per_second:,.0f} tokens/s  MFU {self.mfu:.1%}  "
            f"{duration(self.seconds_left)} left"
        )


class Display:
    """Progress of training on rank 0; on other ranks everything is silent.

    `log` gets every line that is shown, and of the progress bar a line every so many steps; and once the reason, when
    standard output can't be written any more.
    """

    def __init__(
        self, active: bool, every: int, steps: int, first_step: int, log: Callable[[str], None] = lambda text: None
    ) -> None:
        self._console = new_console(quiet=not active)
        self._active = active
        self._log = log
        self._every = every
        self._steps = steps
        self._told_failure = False
        self._bar = ProgressBar(self._console, "training", steps, first_step)

    def say(self, line: str) -> None:
        """Show one line."""
        self._console.print(line, markup=False)
        if self._active:
            self._log(line)
            self._log_failure()

    def step(self, step: int, line: StepLine) -> None:
        """Show a finished step; without a terminal only the first and every so many steps."""
        text = f"step {step}/{self._steps}  {line}{'  ' + line.note if line.note else ''}"
        due = line.note or step == 1 or step % self._every == 0 or step == self._steps
        if self._bar.shown:
            self._bar.update(step, str(line))
            if line.note:
                self._console.print(text, markup=False)
            if due:
                self._log(text)
                self._log_failure()
        elif due:
            self.say(text)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show names and values as a table; the progress bar ends."""
        self._bar.stop()
        self._console.print(values_table(title, rows))
        if self._active:
            self._log("\n".join([title, *(f"  {name}: {value}" for name, value in rows)]))
            self._log_failure()

    def _log_failure(self) -> None:
        """Log why nothing is shown any more, once; the environment also has what happened before there was a log."""
        reason = os.environ.get(TERMINAL_FAILED_VARIABLE)
        if reason is not None and not self._told_failure:
            self._told_failure = True
            self._log(f"standard output can't be written ({reason}): nothing more is shown, the job goes on")

    def __enter__(self) -> Display:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def perplexity(loss: float) -> float:
    """exp of a mean cross entropy in nats; infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
