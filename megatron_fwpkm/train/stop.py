"""Asking a job to stop at the next step: by signal or by a file."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

STOP_FILE_VARIABLE = "FWPKM_STOP_FILE"
"""Environment variable that names a file; the job stops after the step in which the file appears."""


class StopRequest:
    """Set by SIGTERM, SIGINT or the stop file. Ranks may see it at different times: they must agree before acting."""

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._received = False
        file = os.environ.get(STOP_FILE_VARIABLE)
        self._file = Path(file) if file else None
        for number in signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def is_set(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._received or (self._file is not None and self._file.exists())


def end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent dies: a job then saves and stops, whoever was killed."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
