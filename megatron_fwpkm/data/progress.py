"""What a person sees of a preparation: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from megatron_fwpkm.terminal import ProgressBar, new_console

SECONDS_BETWEEN_LINES = 10.0


class PartsProgress:
    """Shows how many parts are finished."""

    def __init__(self, report: Callable[[str], None], parts: int, finished: int) -> None:
        self._report = report
        self._parts = parts
        self._finished = finished
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar = ProgressBar(new_console(), "tokenizing", parts, finished, time_remaining=True)

    def part_done(self, tokens: int) -> None:
        """A further part is finished."""
        self._finished += 1
        self._tokens += tokens
        now = time.monotonic()
        speed = f"{self._tokens / max(now - self._started, 1e-9):,.0f} tokens/s"
        if self._bar.shown:
            self._bar.update(self._finished, f"parts  {speed}")
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._report(f"data: {self._finished}/{self._parts} parts, {speed}")

    def __enter__(self) -> PartsProgress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
