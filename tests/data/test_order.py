"""The order of sequences: permutations that are computed, not stored."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fwpkm.data.order import Permutation, SequenceOrder


@given(st.integers(1, 700), st.integers(0, 1 << 64), st.integers(0, 5))
def test_permutations_and_their_inverses(size: int, seed: int, key: int) -> None:
    permutation = Permutation(size, seed, key)
    image = [permutation(index) for index in range(size)]
    assert sorted(image) == list(range(size))
    assert [permutation.inverse(place) for place in image] == list(range(size))


@given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 9), st.one_of(st.none(), st.integers(0, 99)))
def test_every_epoch_reads_every_sequence_once(sequences: int, stretch: int, group: int, seed: int | None) -> None:
    order = SequenceOrder(sequences, stretch, group, seed)
    for epoch in range(3):
        read = [order(sample) for sample in range(epoch * sequences, (epoch + 1) * sequences)]
        assert sorted(read) == list(range(sequences))
        if seed is None:
            assert read == sorted(read)


@pytest.mark.parametrize("sequences", [1000, 1003])
def test_only_the_stretches_of_one_group_are_in_use_at_a_time(sequences: int) -> None:
    order = SequenceOrder(sequences, 10, 5, seed=1)
    read = [order(sample) for sample in range(sequences)]
    uses: dict[int, list[int]] = {}
    for place, sequence in enumerate(read):
        uses.setdefault(sequence // 10, []).append(place)
    assert all(max(places) - min(places) < 50 for places in uses.values())
    assert sum(read[place + 1] == read[place] + 1 for place in range(sequences - 1)) < 60  # mixed inside, too


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [SequenceOrder(200, 4, 8, seed) for seed in (1, 2)]
    epochs = [
        tuple(order(sample) for sample in range(200 * epoch, 200 * epoch + 200)) for order in orders for epoch in (0, 1)
    ]
    assert len(set(epochs)) == 4


def test_first_places_are_spread_evenly() -> None:
    """Over many epochs each sequence is as often first as any other, about: 4000 draws from 40."""
    order = SequenceOrder(40, 3, 4, seed=9)
    counts = [0] * 40
    for epoch in range(4000):
        counts[order(40 * epoch)] += 1
    # Chi-square with 39 degrees of freedom: below 82 in all but 1 of 10,000 seeds.
    assert sum((count - 100) ** 2 / 100 for count in counts) < 82


def test_cost_does_not_grow_with_the_corpus() -> None:
    tracemalloc.start()
    order = SequenceOrder(10**15, 64, 64, seed=3)
    read = {order(sample) for sample in range(10**15 - 100, 10**15 + 100)}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read) == 200 and peak < 1 << 20
