"""Whole tables from the rows that ranks have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_fwpkm.memory.routing import owned_slots


def whole_table(shards: Sequence[Tensor], n_subkeys: int) -> Tensor:
    """[n², D] from the tables [N, D] of all ranks, in order."""
    if len(shards) == 1:
        return shards[0]
    whole = shards[0].new_empty(n_subkeys**2, shards[0].shape[1])
    for rank, rows_ND in enumerate(shards):
        owned_N = owned_slots(n_subkeys, rank, len(shards))
        there = owned_N >= 0
        whole[owned_N[there]] = rows_ND[there]
    return whole
