"""What a person sees: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_WIDTH = 120
"""Columns of a table where the output is no terminal."""


TERMINAL_FAILED_VARIABLE = "FWPKM_TERMINAL_FAILED"
"""Environment variable with the reason why nothing is shown any more; rank 0 learns it from the command so."""


class Terminal:
    """Standard output, which may fail: then the job goes on in silence, and the reason is kept for the log.

    A full disk behind `> file` or a reader that has gone (`| head`) must not end one rank in the middle of a step.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout  # None where the job was started without one

    def write(self, text: str) -> int:
        """Write text, or nothing once that has failed."""
        if self._stream is not None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._turn_off(error)
        return len(text)

    def flush(self) -> None:
        """Bring what was written to the terminal."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except OSError as error:
                self._turn_off(error)

    def isatty(self) -> bool:
        """Whether a person looks on."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor; raises OSError where it has none."""
        if self._stream is None:
            raise OSError("no standard output")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _turn_off(self, error: OSError) -> None:
        os.environ.setdefault(TERMINAL_FAILED_VARIABLE, error.strerror or str(error))
        # Python's last flush, at the exit, must not fail either: what is still buffered goes nowhere.
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())
        self._stream = None  # for a stream without a descriptor


def print_line(line: str) -> None:
    """Show a line at once, if there is a terminal that takes it."""
    terminal = Terminal()
    terminal.write(line + "\n")
    terminal.flush()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def new_console(quiet: bool = False) -> Console:
    """The terminal as everything here uses it: no colours guessed from words, a fixed width where it is no terminal."""
    terminal = Terminal()
    width = None if terminal.isatty() else PLAIN_WIDTH
    return Console(file=cast(IO[str], terminal), quiet=quiet, highlight=False, soft_wrap=True, width=width)


def values_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values, one below the other."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    return table


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
        self._task: Any = None
        self._progress: Progress | None = None
        if active and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("training", total=steps, completed=first_step, line="")

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
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=str(line))
            if line.note:
                self._console.print(text, markup=False)
            if due:
                self._log(text)
                self._log_failure()
        elif due:
            self.say(text)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show names and values as a table; the progress bar ends."""
        self._stop()
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
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def perplexity(loss: float) -> float:
    """exp of a mean cross entropy in nats; infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
