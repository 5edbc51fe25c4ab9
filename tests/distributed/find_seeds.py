"""Finds seeds for cells of the equivalence matrix: `python -m tests.distributed.find_seeds`; prints them as JSON.

A seed will do when all slots are chosen by a margin that rounding can't reach, and when no gradient nearly cancels, so
that one rank's own float32 is exact to a fraction of the tolerance.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import count

import torch

from tests.distributed.cells import LARGEST_ROUNDING, SMALLEST_MARGIN, Cell, all_cells, seed_key
from tests.distributed.workers.equivalence import rounding, train_on_one_rank


def find_seed(cell: Cell) -> int:
    """The first seed that will do."""
    for seed in count(1):
        candidate = dataclasses.replace(cell.without_layout(), seed=seed)
        train_on_one_rank.cache_clear()
        margin = train_on_one_rank(candidate).margin
        if margin > SMALLEST_MARGIN and (error := rounding(candidate)) < LARGEST_ROUNDING:
            print(f"{seed_key(cell)}: {seed}, margin {margin:.1e}, rounding {error:.1e}", file=sys.stderr, flush=True)
            return seed
    raise AssertionError


def main() -> None:
    """Find a seed for every training of the matrix."""
    torch.set_num_threads(1)
    keys = {seed_key(cell): cell for cell in all_cells() if cell.precision == "float32"}
    wanted = [key for key in sorted(keys) if len(sys.argv) < 2 or key in sys.argv[1:]]
    print(json.dumps({key: find_seed(keys[key]) for key in wanted}, indent=4))


if __name__ == "__main__":
    main()
