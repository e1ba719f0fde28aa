"""Intervals for one model, or for two models that answered the same items.

* One accuracy: the Wilson score interval (Wilson 1927; ``scipy.stats``), which stays honest at 0 % and 100 %.
* The difference of two models: a paired percentile bootstrap (Efron & Tibshirani 1993, ch. 13; Koehn 2004,
  https://aclanthology.org/W04-3250): items are drawn with replacement, and both models keep their outcome on
  a drawn item, so that what both find hard cancels.

Several training seeds need more than items: see :mod:`shifcon_fast.evaluation.across_seeds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

_INDICES_AT_ONCE = 4_000_000  # 32 MB of int64


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, in the unit of the outcomes."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero: a difference beyond noise."""
        return self.low > 0 or self.high < 0


def wilson_interval(outcomes: ArrayLike, confidence: float = 0.95) -> Interval:
    """Share of right answers with its Wilson score interval.

    Args:
        outcomes: (n,) of 0 and 1, or booleans.

    Raises:
        ValueError: no outcome, or one that is neither 0 nor 1.
    """
    values = _vector(outcomes, "outcomes")
    if not np.isin(values, (0.0, 1.0)).all():
        raise ValueError(
            f"outcomes holds {values[~np.isin(values, (0.0, 1.0))][0]}; wanted 0 (wrong) or 1 (right)"
        )
    right = int(values.sum())
    limits = binomtest(right, values.size).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(right / values.size, float(limits.low), float(limits.high))


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ``values`` (n,) with its percentile bootstrap interval; the same seed gives the same interval."""
    sample = _vector(values, "values")
    return ratio_interval(sample, np.ones_like(sample), confidence=confidence, resamples=resamples, seed=seed)


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Σ numerators / Σ denominators, (n,) each, with its percentile bootstrap interval over the n items.

    What is averaged over tokens but drawn by sentences, such as a log perplexity.

    Raises:
        ValueError: different numbers of items, none, or a denominator that is not positive.
    """
    above, below = _vector(numerators, "numerators"), _vector(denominators, "denominators")
    if above.size != below.size:
        raise ValueError(f"numerators has {above.size} items and denominators {below.size}; wanted as many")
    if below.min() <= 0:
        raise ValueError(f"denominators holds {below.min()}; wanted positive numbers")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; wanted a number between 0 and 1, such as 0.95")
    generator = np.random.default_rng(seed)
    rows = max(1, _INDICES_AT_ONCE // above.size)
    ratios = []
    for done in range(0, resamples, rows):
        drawn = generator.integers(above.size, size=(min(rows, resamples - done), above.size))
        ratios.append(above[drawn].sum(axis=1) / below[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(above.sum() / below.sum()), float(low), float(high))


def paired_interval(
    first: ArrayLike,
    second: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ``first − second`` with its paired bootstrap interval.

    Args:
        first, second: (n,) outcomes of two models; position i is the same item in both.

    Raises:
        ValueError: different numbers of items, or none.
    """
    a, b = _vector(first, "first"), _vector(second, "second")
    if a.size != b.size:
        raise ValueError(f"first has {a.size} items and second {b.size}; wanted the same items in both")
    return bootstrap_interval(a - b, confidence=confidence, resamples=resamples, seed=seed)


def _vector(values: ArrayLike | Sequence[bool], name: str) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} has shape {vector.shape}; wanted one dimension with at least one item")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds NaN or infinity; wanted finite numbers")
    return vector
