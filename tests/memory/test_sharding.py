"""Who owns which slot, which tokens a rank has, and what its table holds; whole memories in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from megatron_fwpkm.memory import FastState, MemoryConfig
from megatron_fwpkm.memory.chunk import chunk_bounds
from megatron_fwpkm.memory.routing import owned_slots
from megatron_fwpkm.memory.sharding import Owners, token_share

RANKS = [2, 3, 4, 7]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("n_subkeys", [7, 8, 12])
def test_every_slot_has_one_owner_and_one_row(n_subkeys: int, ranks: int) -> None:
    owners = Owners(n_subkeys, ranks)
    owned = [owned_slots(n_subkeys, rank, ranks) for rank in range(ranks)]
    assert sorted(slot for slots in owned for slot in slots.tolist() if slot >= 0) == list(range(n_subkeys**2))
    slots = torch.arange(3 * n_subkeys**2)  # of three memories
    owner, row = owners.locate(slots)
    for slot in slots.tolist():
        memory, inside = divmod(slot, n_subkeys**2)
        assert owner[slot] == (inside // n_subkeys + inside % n_subkeys) % ranks
        assert owned[owner[slot]][row[slot] - memory * owners.rows] == inside
    # Neither a line nor a column of slots loads one rank alone.
    for hot in (slots[:n_subkeys], slots[: n_subkeys**2 : n_subkeys]):
        assert int(torch.bincount(owners.locate(hot)[0]).max()) <= -(-n_subkeys // ranks)


@pytest.mark.parametrize(("n_subkeys", "v_dim"), [(8, 6), (7, 5), (16, 16)])
@pytest.mark.parametrize("ranks", RANKS)
def test_tables_of_ranks_are_parts_of_the_whole_one(n_subkeys: int, v_dim: int, ranks: int) -> None:
    config = MemoryConfig(heads=1, topk=2, n_subkeys=n_subkeys, k_dim=4, v_dim=v_dim)
    whole = FastState(config, seed=4)
    for rank in range(ranks):
        part = FastState(config, seed=4, rank=rank, ranks=ranks)
        assert part.owned is not None and torch.equal(part.keys_H2nd, whole.keys_H2nd)
        there = part.owned >= 0
        assert torch.equal(part.table_ND[there], whole.table_ND[part.owned[there]])
        assert not part.table_ND[~there].any()
    with pytest.raises(ValueError, match=f"slots of {n_subkeys} sub-keys go to 1 to that many ranks"):
        FastState(config, rank=0, ranks=n_subkeys + 1)


@pytest.mark.parametrize("ranks", [1, *RANKS])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 8, 27, 40])
def test_ranks_share_every_chunk(tokens: int, lookahead: int, ranks: int) -> None:
    config = MemoryConfig(heads=1, topk=2, n_subkeys=8, k_dim=4, v_dim=4, chunk_size=8, lookahead=lookahead)
    shares = [token_share(tokens, config, rank, ranks) for rank in range(ranks)]
    assert sorted(position for share in shares for position in share.own.tolist()) == list(range(tokens))
    for number, (start, end) in enumerate(chunk_bounds(tokens, config)):
        spans = [share.spans[number] for share in shares]
        assert {(span.length, span.pairs) for span in spans} == {(end - start, max(end - start - lookahead, 0))}
        assert sum(span.own_pairs for span in spans) == spans[0].pairs
        assert max(span.own_length for span in spans) - min(span.own_length for span in spans) <= 1
        for share, span in zip(shares, spans, strict=True):
            own = share.own[span.tokens].tolist()
            assert share.targets[span.targets].tolist() == [one + lookahead for one in own[: span.own_pairs]]
            assert all(one + lookahead >= end for one in own[span.own_pairs :])
