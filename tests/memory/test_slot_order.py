"""The order of a table's rows in files."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_fwpkm.memory.routing import owned_slots
from megatron_fwpkm.memory.slot_order import CLASSES, owned_rows


@pytest.mark.parametrize("n_subkeys", [1, 3, 5, 16, 70, 130])
def test_ranks_find_their_rows_in_runs(n_subkeys: int) -> None:
    order = owned_rows(n_subkeys, 0, 1).rows
    assert order.sort().values.tolist() == list(range(n_subkeys**2))
    for ranks in (1, 2, 3, 4, 7, 8, 64):
        if ranks > n_subkeys:
            continue
        filled = torch.zeros(n_subkeys**2)
        for rank in range(ranks):
            own = owned_rows(n_subkeys, rank, ranks)
            places = torch.cat([torch.arange(start, stop) for start, stop in own.runs])
            assert torch.equal(owned_slots(n_subkeys, rank, ranks)[own.rows], order[places])
            filled[places] += 1
            limit = CLASSES // ranks if CLASSES % ranks == 0 else 2 * n_subkeys // ranks + 1
            assert len(own.runs) <= limit
            assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(own.runs))
        assert bool((filled == 1).all())


def test_the_order_is_part_of_the_format() -> None:
    """Sums a + b of 0, then 1, ...: of three sub-keys (0,0) (0,1) (1,0) (0,2) (1,1) (2,0) (1,2) (2,1) (2,2)."""
    assert owned_rows(3, 0, 1).rows.tolist() == [0, 1, 3, 2, 4, 6, 5, 7, 8]
    of_seventy = owned_rows(70, 0, 1).rows
    assert of_seventy[:3].tolist() == [0, 64, 1 * 70 + 63]  # the sums 0 and 64 are of one class
