"""What a person sees of a preparation: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


class PartsProgress:
    """Shows how many parts are finished."""

    def __init__(self, report: Callable[[str], None], parts: int, finished: int) -> None:
        self._report = report
        self._parts = parts
        self._finished = finished
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("tokenizing"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("parts  {task.fields[speed]}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("tokenizing", total=parts, completed=finished, speed="")

    def part_done(self, tokens: int) -> None:
        """A further part is finished."""
        self._finished += 1
        self._tokens += tokens
        now = time.monotonic()
        speed = f"{self._tokens / max(now - self._started, 1e-9):,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._finished, speed=speed)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._report(f"data: {self._finished}/{self._parts} parts, {speed}")

    def __enter__(self) -> PartsProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
