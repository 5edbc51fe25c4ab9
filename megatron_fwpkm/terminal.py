"""Standard output as everything here uses it: consoles, progress bars, tables, and output that may fail."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
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
                self._stream.write(self._encodable(text))
            except OSError as error:
                self._turn_off(error)
        return len(text)

    def _encodable(self, text: str) -> str:
        """The text with "?" for what the stream's encoding lacks: a name in a path must not end a job."""
        return text.encode(self.encoding, "replace").decode(self.encoding)

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


class ProgressBar:
    """A bar where a person looks on, from `with` to stop() or the end of the block; elsewhere nothing is shown."""

    def __init__(
        self, console: Console, title: str, total: int | None = None, done: int = 0, time_remaining: bool = False
    ) -> None:
        self._progress: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._progress = Progress(
                TextColumn(title),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn() if time_remaining else TimeElapsedColumn(),
                console=console,
            )
            self._task = self._progress.add_task(title, total=total, completed=done, text="")

    @property
    def shown(self) -> bool:
        """Whether there is a bar: if not, the caller prints lines."""
        return self._progress is not None

    def update(self, done: int, text: str = "", total: int | None = None) -> None:
        """Show that so much is done, with a text beside it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, text=text)

    def stop(self) -> None:
        """End the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
