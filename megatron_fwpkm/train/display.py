"""What a person sees: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_WIDTH = 120
"""Columns of the table where the output is no terminal."""


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Display:
    """Progress of training on rank 0; on other ranks everything is silent."""

    def __init__(self, active: bool, every: int, steps: int, first_step: int) -> None:
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        self._console = Console(quiet=not active, highlight=False, soft_wrap=True, width=width)
        self._every = every
        self._steps = steps
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

    def step(self, step: int, loss: float, tokens_per_second: float, seconds_left: float, note: str = "") -> None:
        """Show a finished step; without a terminal only the first and every so many steps."""
        line = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {duration(seconds_left)} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
            if note:
                self.say(f"step {step}: {note}")
        elif note or step == 1 or step % self._every == 0 or step == self._steps:
            self.say(f"step {step}/{self._steps}  {line}{'  ' + note if note else ''}")

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Show names and values as a table; the progress bar ends."""
        self._stop()
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows:
            table.add_row(name, value)
        self._console.print(table)

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
