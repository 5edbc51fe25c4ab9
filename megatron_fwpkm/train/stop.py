"""Asking a job to stop at the end of the running step: by signal or by a file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_fwpkm.processes import end_with_parent as end_with_parent

STOP_FILE_VARIABLE = "FWPKM_STOP_FILE"
"""Environment variable that names a file; the job stops after the step in which the file appears."""


SAME_REQUEST_SECONDS = 1.0
"""Signals that close together are one request: a terminal and a launcher may both pass on the same Ctrl-C."""


class StopRequest:
    """Set by SIGTERM, SIGINT or the stop file. Ranks may see it at different times: they must agree before acting.

    A second signal ends the process at once, as the signal itself would have.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._received: float | None = None
        file = os.environ.get(STOP_FILE_VARIABLE)
        self._file = Path(file) if file else None
        for number in signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = now
        elif now - self._received > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def is_set(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._received is not None or (self._file is not None and self._file.exists())
