"""95 % intervals: Wilson's for shares, bootstrap over sequences for perplexities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

NORMAL_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """value, low and high by name."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def text(self, digits: int = 2) -> str:
        """value [low, high]."""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def wilson(successes: float, trials: int) -> Estimate:
    """Share of successes with Wilson's score interval.

    `successes` may be a sum of shares in [0, 1], as digits right in each of so many answers: their mean varies no more
    than that of trials which are all or nothing, so the interval is then a little too wide, never too narrow.
    Raises ValueError unless 0 <= successes <= trials and trials > 0.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    share, spread = successes / trials, NORMAL_95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = NORMAL_95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Estimate(share, low, high)


class SequenceBootstrap:
    """Resamples whole sequences with replacement; the same resamples for every quantity, so that ratios are paired."""

    def __init__(self, sequences: int, resamples: int, seed: int = 0) -> None:
        generator = numpy.random.default_rng(seed)
        share = numpy.full(sequences, 1.0 / sequences)
        self._weight_RS = generator.multinomial(sequences, share, size=resamples).astype(numpy.float64)

    def perplexity(self, loss_S: NDArray[Any], count_S: NDArray[Any]) -> Estimate:
        """exp(sum of losses / number of tokens), in nats, over sequences; NaN where no token counts."""
        return _estimate(
            _perplexity(loss_S.sum(), count_S.sum()), _perplexity(self._weight_RS @ loss_S, self._weight_RS @ count_S)
        )

    def ratio(self, loss_S: NDArray[Any], base_loss_S: NDArray[Any], count_S: NDArray[Any]) -> Estimate:
        """Perplexity of `loss` divided by that of `base_loss` on the same tokens."""
        return self.perplexity(loss_S - base_loss_S, count_S)


def _perplexity(loss: Any, count: Any) -> Any:
    with numpy.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return numpy.exp(numpy.divide(loss, count))


def _estimate(value: Any, resampled_R: NDArray[Any]) -> Estimate:
    usable = resampled_R[~numpy.isnan(resampled_R)]  # a resample may hold no token of a bucket
    if not usable.size:
        return Estimate(float(value), math.nan, math.nan)
    low, high = numpy.quantile(usable, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
