"""What a memory group sends: bytes and messages of this rank to other ranks, by phase, and how even the load is.

Counted as the exchanges are called, in plain integers from sizes that the host knows anyway. What a rank sends to
itself costs nothing. An all-gather sends its message to each other rank; an all-reduce is counted as a ring: a
reduce-scatter and an all-gather of equal parts (the last one padded).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

Phase = Literal["plan", "read", "write", "keys"]
PHASES = (*get_args(Phase), "backward")
"""What is counted apart."""


@dataclass
class Traffic:
    """Sums since the last `take`.

    Attributes:
        sent_bytes, messages: by phase of the forward pass (plan, read, write, keys) and "backward" for all of the other
        reads_here: reads that addressed rows of this rank
        reads_of_all: reads of all ranks
        rows_here: distinct rows among `reads_here`, chunk by chunk
        chunks: chunks that were read
    """

    ranks: int
    sent_bytes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    reads_here: int = 0
    reads_of_all: int = 0
    rows_here: int = 0
    chunks: int = 0
    _in_backward: bool = False

    def add(self, phase: Phase, sent_bytes: int, messages: int) -> None:
        """Count one exchange."""
        name = "backward" if self._in_backward else phase
        self.sent_bytes[name] += sent_bytes
        self.messages[name] += messages

    def add_chunk(self, reads_here: int, rows_here: int, reads_of_all: int) -> None:
        """Count one chunk's reads."""
        self.reads_here += reads_here
        self.rows_here += rows_here
        self.reads_of_all += reads_of_all
        self.chunks += 1

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Within the context everything counts as "backward"."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    @property
    def load(self) -> float:
        """Reads here / mean over ranks: the largest of all ranks is the imbalance of owners."""
        return self.reads_here * self.ranks / max(self.reads_of_all, 1)

    @property
    def distinct_ratio(self) -> float:
        """Distinct rows / reads, here."""
        return self.rows_here / max(self.reads_here, 1)

    def __add__(self, other: Traffic) -> Traffic:
        """The counts of both, of the same ranks."""
        return Traffic(
            self.ranks,
            self.sent_bytes + other.sent_bytes,
            self.messages + other.messages,
            self.reads_here + other.reads_here,
            self.reads_of_all + other.reads_of_all,
            self.rows_here + other.rows_here,
            self.chunks + other.chunks,
        )

    def take(self) -> Traffic:
        """What was counted; counting starts anew."""
        taken = Traffic(
            self.ranks,
            self.sent_bytes,
            self.messages,
            self.reads_here,
            self.reads_of_all,
            self.rows_here,
            self.chunks,
        )
        self.sent_bytes, self.messages = Counter(), Counter()
        self.reads_here = self.reads_of_all = self.rows_here = self.chunks = 0
        return taken
