"""Intervals against scipy, and what they must mean."""

from __future__ import annotations

import math

import numpy
import pytest
import scipy.stats

from megatron_fwpkm.evaluate.intervals import SequenceBootstrap, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 8), (1, 8), (4, 8), (8, 8), (3, 100), (70, 100), (999, 1000)])
def test_wilson_is_scipys(successes: int, trials: int) -> None:
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_shares_lies_between_those_of_whole_numbers() -> None:
    low, middle, high = wilson(3, 10), wilson(3.5, 10), wilson(4, 10)
    assert low.low < middle.low < high.low and low.high < middle.high < high.high


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_share(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes in"):
        wilson(successes, trials)


def test_bootstrap_is_scipys_within_its_noise() -> None:
    draw = numpy.random.default_rng(0)
    counts = draw.integers(50, 150, 40).astype(float)
    losses = counts * draw.normal(3.0, 0.4, 40)
    found = SequenceBootstrap(40, 20000).perplexity(losses, counts)
    expected = scipy.stats.bootstrap(
        (losses, counts),
        lambda x, y, axis: numpy.exp(x.sum(axis) / y.sum(axis)),
        paired=True, vectorized=True, method="percentile", n_resamples=20000, random_state=1,
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(math.exp(losses.sum() / counts.sum()))
    width = expected.high - expected.low
    assert abs(found.low - expected.low) < 0.05 * width and abs(found.high - expected.high) < 0.05 * width


def test_bootstrap_is_repeatable_and_pairs_ratios() -> None:
    draw = numpy.random.default_rng(0)
    counts = numpy.full(30, 100.0)
    losses = counts * draw.normal(3.0, 0.5, 30)
    one, other = SequenceBootstrap(30, 1000), SequenceBootstrap(30, 1000)
    assert one.perplexity(losses, counts) == other.perplexity(losses, counts)
    # Every sequence is worse by the same factor: paired, there is nothing uncertain about it.
    ratio = one.ratio(losses + 0.1 * counts, losses, counts)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((math.exp(0.1),) * 3)


def test_bootstrap_of_tokens_that_few_sequences_have() -> None:
    counts = numpy.array([0.0, 0.0, 0.0, 5.0])
    found = SequenceBootstrap(4, 500).perplexity(counts * 2.0, counts)
    assert (found.low, found.value, found.high) == pytest.approx((math.exp(2.0),) * 3)
    empty = SequenceBootstrap(4, 500).perplexity(numpy.zeros(4), numpy.zeros(4))
    assert math.isnan(empty.value) and math.isnan(empty.low)
