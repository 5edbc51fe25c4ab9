"""What this process is doing, in words: for the message about a rank that died or failed.

A process has one such note, `PHASE`. Whoever begins something writes it down, which costs an assignment; the watch over
the other ranks reads it from its own thread, and backward passes may run in yet another. What is done beside the
process's work is `aside`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Phase:
    """Work, such as "in the forward pass of step 7", and the place in the model where it has come to.

    What is noted for a context stays when an error leaves the context: it then tells where the error was raised.
    """

    def __init__(self) -> None:
        self.work = "starting"
        self.place = ""
        self._own = threading.local()

    @contextmanager
    def during(self, work: str) -> Iterator[None]:
        """Within the context this process is at some work, at no place in the model as yet."""
        if self._is_aside():
            before_aside, self._own.work = self._own.work, work
            yield
            self._own.work = before_aside
            return
        before = self.work, self.place
        self.work, self.place = work, ""
        yield
        self.work, self.place = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the context what this thread does is noted for it alone."""
        self._own.aside, self._own.work = True, "starting"
        yield
        self._own.aside = False

    def of_thread(self) -> str:
        """What this thread does, be it aside or not."""
        return self._own.work if self._is_aside() else str(self)

    def _is_aside(self) -> bool:
        return getattr(self._own, "aside", False)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Within the context the work is at a place such as "memory of block 2"."""
        before, self.place = self.place, place
        yield
        self.place = before

    def __str__(self) -> str:
        """To go after "was": "in the forward pass of step 7 (memory of block 2)"."""
        return f"{self.work} ({self.place})" if self.place else self.work


PHASE = Phase()
