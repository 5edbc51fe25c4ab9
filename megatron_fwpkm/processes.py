"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def end_with_parent(number: signal.Signals = signal.SIGTERM, parent: int | None = None) -> None:
    """Ask Linux to send this process a signal when its parent dies: with SIGTERM a job saves and stops, whoever dies.

    `parent` is the id of the parent where it is known: if it is dead already, the signal comes at once. For Linux the
    parent is the thread that started this process: it must last as long.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, number)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), number)
