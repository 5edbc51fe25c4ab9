"""Undo log of a fast state: takes back any number of writes at the cost of the rows that they touched."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class UndoEntry:
    """Stored rows before a write; without slots, the whole table before a fold of the running scale."""

    slots_U: Tensor | None
    rows_UD: Tensor


@dataclass
class UndoLog:
    """What was there before each write, newest last, and the small state at the start of the step.

    Entries may share storage with what a backward pass has saved, so logging the current call costs no copy. Entries
    of earlier calls are compacted to the first touch of each row: a log never grows beyond the distinct rows touched
    plus those of one call. There are two places to go back to: the start of the step and that of the current call.
    """

    keys: Tensor
    scale: float
    entries: list[UndoEntry] = field(default_factory=list)
    call_start: int = 0

    def begin_call(self) -> int:
        """Note that a call starts; returns the number of entries to undo it down to."""
        self.call_start = len(self.entries)
        return self.call_start

    def record(self, slots_U: Tensor, stored_UD: Tensor) -> None:
        """Note rows in stored units, as they are before a write. They must not be changed afterwards."""
        if not self._call_is_covered():
            self.entries.append(UndoEntry(slots_U, stored_UD))

    def record_table(self, table_ND: Tensor) -> None:
        """Note the whole table (copied): folding is not reversible row by row. At most one copy a call."""
        if not self._call_is_covered():
            self.entries.append(UndoEntry(None, table_ND.clone()))

    def _call_is_covered(self) -> bool:
        """Whether the current call has noted the whole table: what it writes later needs no entry."""
        return len(self.entries) > self.call_start and self.entries[-1].slots_U is None

    def compact(self) -> None:
        """Keep only what going back to the start of the step needs: the first touch of each row."""
        for index, entry in enumerate(self.entries):
            if entry.slots_U is None:  # undoing this one undoes all that follow
                self.entries = self.entries[: index + 1]
                return
        if len(self.entries) < 2:
            return
        entries = [(entry.slots_U, entry.rows_UD) for entry in self.entries if entry.slots_U is not None]
        slots = torch.cat([s for s, _ in entries])
        ordered, order = torch.sort(slots, stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        keep = order[first].sort().values  # the earliest entry of each slot: the first sort is stable
        ends = torch.tensor([s.numel() for s, _ in entries], device=slots.device).cumsum(0)
        places = [0, *torch.searchsorted(keep, ends).tolist()]
        begins = [0, *ends.tolist()]
        kept = [rows[keep[places[i] : places[i + 1]] - begins[i]] for i, (_, rows) in enumerate(entries)]
        self.entries = [UndoEntry(slots[keep], torch.cat(kept))]

    def undo(self, table_ND: Tensor, keep_entries: int = 0) -> None:
        """Put everything back, newest entry first, down to the first `keep_entries` entries."""
        while len(self.entries) > keep_entries:
            entry = self.entries.pop()
            if entry.slots_U is None:
                table_ND.copy_(entry.rows_UD)
            else:
                table_ND.index_copy_(0, entry.slots_U, entry.rows_UD)
