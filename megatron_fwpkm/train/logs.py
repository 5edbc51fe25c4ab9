"""The log files of a run: what rank 0 said, and what each rank has to say about its end."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import platform
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

_LOGGER = logging.getLogger("megatron_fwpkm")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def rank_log_path(run_directory: Path, rank: int) -> Path:
    """Log file of one rank."""
    return run_directory / "logs" / f"rank_{rank:05d}.log"


class TrainLog:
    """logs/train.log: the lines that rank 0 shows, each with its time."""

    def __init__(self, run_directory: Path) -> None:
        self._file = (run_directory / "logs" / "train.log").open("a")

    def write(self, text: str) -> None:
        """Append lines. Raises OSError when they can't be written."""
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S%z")
        self._file.write("".join(f"{now} {line}\n" for line in text.splitlines()))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _QuietHandler(logging.FileHandler):
    """A log that can't be written must not end a job, nor fill its terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class RankLog:
    """logs/rank_<rank>.log: warnings, tracebacks and crashes of one process, so that a dying rank leaves its reason.

    Within the context Python's warnings, uncaught errors of threads and fatal signals go to the file instead of the
    terminal. Raises OSError where the file can't be opened.
    """

    def __init__(self, run_directory: Path, rank: int, world_size: int) -> None:
        self.path = rank_log_path(run_directory, rank)
        self._title = f"rank {rank} of {world_size}, process {os.getpid()} on {platform.node()}: {' '.join(sys.argv)}"
        self._handler: logging.FileHandler | None = None
        self._crashes: IO[str] | None = None
        self._had_crash_handler = False

    def __enter__(self) -> RankLog:
        self._handler = _QuietHandler(self.path)
        self._handler.setLevel(logging.WARNING)
        self._handler.setFormatter(logging.Formatter(_FORMAT))
        self._handler.handle(_LOGGER.makeRecord(_LOGGER.name, logging.WARNING, "", 0, self._title, (), None))
        for logger in self._loggers():
            logger.addHandler(self._handler)
        logging.captureWarnings(True)
        threading.excepthook = _log_thread_error
        self._crashes = self.path.open("a")
        self._had_crash_handler = faulthandler.is_enabled()
        faulthandler.enable(self._crashes)
        return self

    def error(self, message: str, error: BaseException | None = None) -> None:
        """Write a message, and an error's traceback."""
        if self._handler is not None:
            details = None if error is None else (type(error), error, error.__traceback__)
            self._handler.handle(
                _LOGGER.makeRecord(_LOGGER.name, logging.ERROR, "", 0, message, (), details)  # type: ignore[arg-type]
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        faulthandler.disable()
        if self._had_crash_handler:
            # The process's own stream: what stands in for it (in tests) may have no file behind it.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                faulthandler.enable(sys.__stderr__)  # type: ignore[arg-type]
        threading.excepthook = threading.__excepthook__
        logging.captureWarnings(False)
        if self._crashes is not None:
            self._crashes.close()
        if self._handler is not None:
            for logger in self._loggers():
                logger.removeHandler(self._handler)
            self._handler.close()

    @staticmethod
    def _loggers() -> list[logging.Logger]:
        """The root, and DeepSpeed's, which keeps its records to itself."""
        return [logging.getLogger(), logging.getLogger("DeepSpeed")]


def _log_thread_error(arguments: threading.ExceptHookArgs) -> None:
    details = (arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
    name = arguments.thread.name if arguments.thread is not None else "unknown"
    _LOGGER.error("uncaught error in thread %s", name, exc_info=details)  # type: ignore[arg-type]
