"""Undo log of a fast state: takes back any number of writes at the cost of the rows that they touched."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class UndoLog:
    """Rows as they were before each write, newest last, and the small state at the start.

    Entries may share storage with what a backward pass has saved, so logging the current call costs no copy. Entries
    of earlier calls are compacted to the first touch of each row: a log never grows beyond the distinct rows touched
    plus those of one call.
    """

    keys: Tensor
    scale: float
    version: int
    entries: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    table: Tensor | None = None  # whole copy, only after a fold of the running scale (see FastState)

    def record(self, slots_U: Tensor, stored_UD: Tensor) -> None:
        """Note rows in stored units, as they are before a write. They must not be changed afterwards."""
        if self.table is None:
            self.entries.append((slots_U, stored_UD))

    def compact(self) -> None:
        """Keep only the first touch of each row."""
        if len(self.entries) < 2:
            return
        slots = torch.cat([entry[0] for entry in self.entries])
        ordered, order = torch.sort(slots, stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        keep = order[first]  # the earliest entry of each slot: the sort is stable
        width = self.entries[0][1].shape[1]
        rows = self.entries[0][1].new_empty(keep.numel(), width)
        begin = 0
        for entry_slots, entry_rows in self.entries:
            end = begin + entry_slots.numel()
            here = ((keep >= begin) & (keep < end)).nonzero().view(-1)
            rows[here] = entry_rows[keep[here] - begin]
            begin = end
        self.entries = [(slots[keep], rows)]

    def undo(self, table_ND: Tensor, keep_entries: int = 0) -> None:
        """Put rows back, newest entry first, down to the first `keep_entries` entries."""
        if self.table is not None and keep_entries == 0:
            table_ND.copy_(self.table)
            self.table = None
        while len(self.entries) > keep_entries:
            slots, rows = self.entries.pop()
            table_ND.index_copy_(0, slots, rows)
