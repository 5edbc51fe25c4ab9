"""The order of a table's rows in checkpoints: one that any number of ranks finds its rows in, in few runs.

Slot (a, b) belongs to rank (a + b) mod R (`routing.owned_slots`). In files the rows go by (a + b) mod 64, then by
a + b, then by a: for every R that divides 64 the rows of a rank are at most 64 / R stretches, for any other they are
the stretches of equal a + b, at most 2 n / R + 1 of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 64
"""Part of the format of checkpoints."""


@dataclass(frozen=True)
class OwnedRows:
    """A rank's rows in the order of files.

    Attributes:
        runs: first and last (exclusive) place of each stretch in the file's order
        rows: [all stretches together] the rows of the rank's table that go there
    """

    runs: tuple[tuple[int, int], ...]
    rows: Tensor


def _diagonals(n_subkeys: int) -> list[int]:
    """The sums a + b in the order of files."""
    return [total for group in range(CLASSES) for total in range(group, 2 * n_subkeys - 1, CLASSES)]


def _first_subkeys(n_subkeys: int, total: int) -> tuple[int, int]:
    """Least a and one more than the greatest, of the slots with this a + b."""
    return max(0, total - n_subkeys + 1), min(total, n_subkeys - 1) + 1


@functools.lru_cache(maxsize=8)
def owned_rows(n_subkeys: int, rank: int, ranks: int) -> OwnedRows:
    """Where the rows of a rank's table (in the order of `routing.owned_slots`) go in the order of files.

    Of one rank alone the rows are the slots: `owned_rows(n, 0, 1).rows` is the order itself.
    """
    width = -(-n_subkeys // ranks)
    runs: list[tuple[int, int]] = []
    rows, place = [], 0
    for total in _diagonals(n_subkeys):
        begin, end = _first_subkeys(n_subkeys, total)
        start, place = place, place + end - begin
        if total % ranks != rank:
            continue
        first = torch.arange(begin, end)
        rows.append(first * width + torch.div(total - first, ranks, rounding_mode="floor"))
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, place))
    return OwnedRows(tuple(runs), torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64))
