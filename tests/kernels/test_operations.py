"""The sparse operations against their references on random shapes."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fwpkm_kernels import (
    available_backends,
    gather_dot,
    gather_weighted_sum,
    plan_segments,
    plan_slots,
    product_key_topk,
    reference,
    register,
    scatter_weighted_add,
    use_backend,
)

sizes = st.integers(1, 9)


@settings(max_examples=100, deadline=None)
@given(rows=sizes, queries=sizes, pairs=sizes, width=sizes, seed=st.integers(0, 10**6), wide=st.booleans())
def test_sums_and_dots(rows: int, queries: int, pairs: int, width: int, seed: int, wide: bool) -> None:
    dtype, tolerance = (torch.float64, 1e-13) if wide else (torch.float32, 1e-5)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, width, generator=generator, dtype=dtype)
    index = torch.randint(0, rows, (queries, pairs), generator=generator)
    weight = torch.randn(queries, pairs, generator=generator, dtype=dtype)
    source = torch.randn(queries, width, generator=generator, dtype=dtype)
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    summed = reference.gather_weighted_sum(table, index, weight)
    close(gather_weighted_sum(table, index, weight), summed)
    close(gather_dot(table, index, source), reference.gather_dot(table, index, source))
    scattered = reference.scatter_weighted_add(rows, index, source, weight)
    close(scatter_weighted_add(plan_segments(index, rows), source, weight), scattered)
    plan = plan_slots(index)
    assert torch.equal(plan.slots_U, index.unique())
    assert torch.equal(plan.slots_U[plan.inverse_XP], index)
    assert torch.equal(plan.counts_U, torch.bincount(index.flatten(), minlength=rows)[plan.slots_U])
    close(scatter_weighted_add(plan.segments, source, weight), scattered[plan.slots_U])


@settings(max_examples=100, deadline=None)
@given(rows=sizes, counts=st.lists(st.integers(0, 9), min_size=1, max_size=9), width=sizes, seed=st.integers(0, 10**6))
def test_ragged_sums_and_dots(rows: int, counts: list[int], width: int, seed: int) -> None:
    """Queries with different numbers of pairs, none included."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    number, queries = sum(counts), len(counts)
    table = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    index = torch.randint(0, rows, (number,), generator=generator)
    weight = torch.randn(number, generator=generator, dtype=torch.float64)
    source = torch.randn(queries, width, generator=generator, dtype=torch.float64)
    close = functools.partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)
    summed = reference.gather_weighted_sum(table, index, weight, offsets)
    close(gather_weighted_sum(table, index, weight, offsets), summed)
    close(gather_dot(table, index, source, offsets), reference.gather_dot(table, index, source, offsets))
    plan = plan_slots(index, offsets)
    assert torch.equal(plan.slots_U[plan.inverse_XP], index)
    assert torch.equal(plan.counts_U, torch.bincount(index, minlength=rows)[plan.slots_U])
    query_of_pair = torch.repeat_interleave(torch.arange(queries), torch.tensor(counts))
    assert torch.equal(plan.by_pair(source[:, 0]), source[query_of_pair, 0])
    wanted = torch.zeros_like(table)
    for pair in range(number):
        wanted[index[pair]] += weight[pair] * source[query_of_pair[pair]]
    close(scatter_weighted_add(plan.segments, source, weight), wanted[plan.slots_U])


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 40),
    half=st.integers(1, 8),
    queries=st.integers(1, 12),
    heads=st.integers(1, 3),
    score_type=st.sampled_from(["idw", "dot_product"]),
    duplicates=st.integers(0, 12),
    near=st.sampled_from([1.0, 1e-3]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_product_key_topk(
    n: int,
    half: int,
    queries: int,
    heads: int,
    score_type: str,
    duplicates: int,
    near: float,
    seed: int,
    data: st.DataObject,
) -> None:
    """Same slots in the same order as stable sorting, also with equal sub-keys; scores to rounding."""
    topk = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(heads * 2, queries, half, generator=generator, dtype=torch.float64)
    keys = torch.randn(1, 1, half, generator=generator, dtype=torch.float64).expand(heads * 2, n, half)
    keys = keys + near * torch.randn(heads * 2, n, half, generator=generator, dtype=torch.float64)
    copies = torch.randint(0, n, (duplicates,), generator=generator)
    if duplicates:
        keys[:, copies] = keys[:, copies[:1]]
    top = product_key_topk(query, keys, topk, score_type)
    for head in range(heads):
        halves = slice(2 * head, 2 * head + 2)
        slots, scores, subkeys = reference.product_key_topk(tuple(query[halves]), tuple(keys[halves]), topk, score_type)
        assert torch.equal(top.slot[head], slots)
        assert torch.equal(top.sub_index[halves], subkeys)
        torch.testing.assert_close(top.score[head], scores, rtol=1e-9, atol=1e-9)
        first = top.sub_index[2 * head].gather(1, top.rank[0, head])
        second = top.sub_index[2 * head + 1].gather(1, top.rank[1, head])
        assert torch.equal(first * n + second, top.slot[head])


def test_near_subkeys_keep_their_precision_in_float32() -> None:
    """A query next to a sub-key far from the origin: the matrix product alone has no correct digit there."""
    generator = torch.Generator().manual_seed(0)
    keys = 100 + torch.randn(2, 50, 16, generator=generator)
    query = keys[:, :20] + 1e-2 * torch.randn(2, 20, 16, generator=generator)
    top = product_key_topk(query, keys, 4, "idw")
    wide = product_key_topk(query.double(), keys.double(), 4, "idw")
    assert torch.equal(top.slot, wide.slot)
    torch.testing.assert_close(top.score, wide.score, rtol=1e-5, atol=1e-5)


def test_sums_are_bitwise_repeatable() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 50, (300, 8), generator=generator)
    weight, source = torch.randn(300, 8, generator=generator), torch.randn(300, 64, generator=generator)
    plan = plan_slots(index)
    first = scatter_weighted_add(plan.segments, source, weight)
    assert all(torch.equal(first, scatter_weighted_add(plan.segments, source, weight)) for _ in range(5))


def test_empty_inputs() -> None:
    table, index = torch.randn(3, 4), torch.zeros(0, 2, dtype=torch.int64)
    assert gather_weighted_sum(table, index, torch.zeros(0, 2)).shape == (0, 4)
    assert gather_dot(table, index, torch.zeros(0, 4)).shape == (0, 2)
    assert torch.equal(
        scatter_weighted_add(plan_segments(index, 3), torch.zeros(0, 4), torch.zeros(0, 2)), torch.zeros(3, 4)
    )


def test_backends_are_chosen_by_name() -> None:
    assert "torch" in available_backends("gather_dot")
    with pytest.raises(ValueError, match="unknown kernel backend 'cpp'"), use_backend("cpp"):
        pass
    with pytest.raises(KeyError, match="unknown kernel operation 'gather'"):
        register("gather", "torch", reference.gather_dot)
    register("gather_dot", "naive", reference.gather_dot)
    table, index, source = torch.randn(3, 4), torch.tensor([[0, 2]]), torch.randn(1, 4)
    with use_backend("naive"):
        torch.testing.assert_close(gather_dot(table, index, source), reference.gather_dot(table, index, source))
        with pytest.raises(ValueError, match="'naive' has no gather_weighted_sum; it exists for: torch"):
            gather_weighted_sum(table, index, torch.ones(1, 2))
