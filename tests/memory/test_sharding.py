"""Who owns which slot, which tokens a rank has, and what its table holds; whole memories in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from megatron_fwpkm.memory import FastState, FwPKMLayer, MemoryConfig
from megatron_fwpkm.memory.chunk import chunk_bounds
from megatron_fwpkm.memory.exchange import id_type, pack, unpack
from megatron_fwpkm.memory.routing import count_owned_slots, owned_slots
from megatron_fwpkm.memory.sharding import Owners, column_share, token_share
from megatron_fwpkm.memory.traffic import Traffic

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


@pytest.mark.parametrize(("n_subkeys", "v_dim"), [(8, 12), (7, 12), (16, 24)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_columns_of_ranks_are_parts_of_the_whole_table(n_subkeys: int, v_dim: int, ranks: int) -> None:
    config = MemoryConfig(heads=1, topk=2, n_subkeys=n_subkeys, k_dim=4, v_dim=v_dim)
    whole = FastState(config, seed=4)
    parts = [FastState(config, seed=4, rank=rank, ranks=ranks, sharding="columns") for rank in range(ranks)]
    assert torch.equal(torch.cat([part.table_ND for part in parts], 1), whole.table_ND)
    assert all(torch.equal(part.keys_H2nd, whole.keys_H2nd) and part.owned is None for part in parts)
    with pytest.raises(ValueError, match=f"v_dim is {v_dim}: its columns don't divide among 5 ranks"):
        FastState(config, rank=0, ranks=5, sharding="columns")


@pytest.mark.parametrize("ranks", [1, *RANKS])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 8, 27])
def test_ranks_with_columns_share_queries_and_have_all_vectors(tokens: int, lookahead: int, ranks: int) -> None:
    config = MemoryConfig(heads=1, topk=2, n_subkeys=8, k_dim=4, v_dim=4, chunk_size=8, lookahead=lookahead)
    whole = token_share(tokens, config, 0, 1)
    for rank in range(ranks):
        own, share = token_share(tokens, config, rank, ranks), column_share(tokens, config, rank, ranks)
        assert torch.equal(share.own, own.own) and torch.equal(share.targets, whole.targets)
        for of_share, of_own, of_all in zip(share.spans, own.spans, whole.spans, strict=True):
            assert of_share.queries == of_own.queries
            assert (of_share.tokens, of_share.targets) == (of_all.tokens, of_all.targets)
            assert (of_share.length, of_share.pairs) == (of_all.length, of_all.pairs)


def test_ids_are_sent_as_narrow_as_they_can_be() -> None:
    assert [id_type(count) for count in (1, 2**31, 2**31 + 1)] == [torch.int32, torch.int32, torch.int64]


def test_a_layer_on_one_of_several_ranks_counts_its_own_slots() -> None:
    config = MemoryConfig(heads=1, topk=2, n_subkeys=7, k_dim=4, v_dim=6)
    assert [count_owned_slots(7, rank, 3) for rank in range(3)] == [
        int((owned_slots(7, rank, 3) >= 0).sum()) for rank in range(3)
    ]
    assert FwPKMLayer(5, config).num_parameters().fast == 2 * 7 * 2 + 49 * 6


@pytest.mark.parametrize("numbers", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (4, 3), (1, 3), (0, 3)])
def test_ids_and_numbers_travel_together(shape: tuple[int, ...], ids: torch.dtype, numbers: torch.dtype) -> None:
    slots, weights = torch.randint(2**31 - 1, shape, dtype=ids), torch.randn(shape).to(numbers)
    packed = pack(slots, weights)
    assert packed.shape == (*shape, ids.itemsize + numbers.itemsize)
    there, back = unpack(packed, ids, numbers)
    assert torch.equal(there, slots.long()) and torch.equal(back, weights)


def test_traffic_is_counted_by_phase_and_taken_once() -> None:
    traffic = Traffic(ranks=4)
    traffic.add("read", 100, 3)
    with traffic.backward_pass():
        traffic.add("read", 10, 1)
        traffic.add("keys", 1, 1)
    traffic.add_chunk(reads_here=30, rows_here=15, reads_of_all=80)
    taken = traffic.take()
    assert taken.sent_bytes == {"read": 100, "backward": 11} and taken.messages == {"read": 3, "backward": 2}
    assert (taken.load, taken.distinct_ratio, taken.chunks) == (1.5, 0.5, 1)
    assert not traffic.sent_bytes and not traffic.take().reads_of_all
    both = taken + taken
    assert both.sent_bytes == {"read": 200, "backward": 22} and both.messages == {"read": 6, "backward": 4}
    assert (both.load, both.distinct_ratio, both.chunks, both.rows_here) == (1.5, 0.5, 2, 30)


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
