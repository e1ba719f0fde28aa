"""Intervals for a method that was trained with several seeds and tested on many items.

Two sources of chance: another seed would have given another model, and another test set other items. An
interval over items alone says nothing about the first, and three seeds are too few to resample
them. This is the analysis of variance of the two random effects, with Student's t at Satterthwaite's degrees
of freedom (Satterthwaite 1946); a test simulates how often it covers the truth.

With S seeds and I items, x the S × I outcomes and x̄ₛ, x̄ᵢ their row and column means:

* the same items for every seed (crossed): V = V_s + V_i − V_e, where V_s = var(x̄ₛ)/S, V_i = var(x̄ᵢ)/I and
  V_e = MSE/(S I) is what both hold twice; at least max(V_s, V_i); degrees of freedom V²/(V_s²/(S−1) +
  V_i²/(I−1));
* other items for every seed (nested): V_s already holds both; V = V_s with S − 1 degrees of freedom, unless
  the sampling of items alone explains more, V_w = Σₛ var(xₛ)/Iₛ / S², with Σ Iₛ − S degrees of freedom.

The interval is x̄ ± t √V, x̄ the mean over seeds of the seeds' means.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from shifcon_fast.evaluation.bootstrap import Interval, wilson_interval

Outcomes = Mapping[Hashable, Mapping[Hashable, float]]
"""Seed → item → outcome."""


def seeds_interval(outcomes: Outcomes, confidence: float = 0.95) -> Interval:
    """Share of right answers of a method over seeds and items, with an interval that accounts for both.

    With one seed, or where nothing varies (all right, all wrong), 0/1 outcomes get the Wilson interval over
    the items.

    Args:
        outcomes: between 0 and 1 for every item of every seed (a mean where an item is asked in several languages).

    Raises:
        ValueError: no seed, a seed without items, or an outcome outside of [0, 1].
    """
    rows, crossed = _rows(outcomes)
    pooled = np.concatenate(rows)
    if pooled.min() < 0 or pooled.max() > 1:
        raise ValueError(
            f"outcomes holds {pooled[(pooled < 0) | (pooled > 1)][0]}; wanted shares from 0 to 1"
        )
    variance, freedom = _variance(rows, crossed)
    estimate = float(np.mean([row.mean() for row in rows]))
    if (len(rows) == 1 or variance == 0) and np.isin(pooled, (0.0, 1.0)).all():
        wilson = wilson_interval(rows[0] if crossed else pooled, confidence)
        return Interval(estimate, wilson.low, wilson.high)
    reach = _reach(variance, freedom, confidence)
    return Interval(estimate, max(estimate - reach, 0.0), min(estimate + reach, 1.0))


def paired_seeds_interval(first: Outcomes, second: Outcomes, confidence: float = 0.95) -> Interval:
    """Mean of ``first − second`` over seeds and items: two methods with the same seeds and items.

    Where the two are equal on every item, the interval has no width.

    Raises:
        ValueError: the seeds or the items of a seed differ.
    """
    if first.keys() != second.keys():
        raise ValueError(
            f"first has the seeds {list(first)} and second {list(second)}; wanted the same seeds"
        )
    differences: dict[Hashable, dict[Hashable, float]] = {}
    for seed, items in first.items():
        if items.keys() != second[seed].keys():
            raise ValueError(
                f"first and second answered different items with seed {seed!r}; wanted the same items"
            )
        differences[seed] = {key: value - second[seed][key] for key, value in items.items()}
    rows, crossed = _rows(differences)
    variance, freedom = _variance(rows, crossed)
    estimate, reach = float(np.mean([row.mean() for row in rows])), _reach(variance, freedom, confidence)
    return Interval(estimate, estimate - reach, estimate + reach)


def _rows(outcomes: Outcomes) -> tuple[list[NDArray[np.float64]], bool]:
    """One array a seed, and whether all seeds answered the same items (then in the same order)."""
    if not outcomes:
        raise ValueError("outcomes is empty; wanted at least one seed")
    if empty := [seed for seed, items in outcomes.items() if not items]:
        raise ValueError(
            f"outcomes has no items for seed {empty[0]!r}; wanted at least one item for each seed"
        )
    seeds = list(outcomes.values())
    crossed = all(items.keys() == seeds[0].keys() for items in seeds)
    keys = [list(seeds[0]) if crossed else list(items) for items in seeds]
    return [
        np.array([items[k] for k in order], dtype=np.float64)
        for items, order in zip(seeds, keys, strict=True)
    ], crossed


def _reach(variance: float, freedom: float, confidence: float) -> float:
    return float(student_t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance)) if variance > 0 else 0.0


def _variance(rows: list[NDArray[np.float64]], crossed: bool) -> tuple[float, float]:
    """Variance of the mean over seeds and items, and its degrees of freedom."""
    return _crossed(np.stack(rows)) if crossed else _nested(rows)


def _crossed(x: NDArray[np.float64]) -> tuple[float, float]:
    seeds, items = x.shape
    by_seed = float(x.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    by_item = float(x.mean(axis=0).var(ddof=1)) / items if items > 1 else 0.0
    if seeds == 1 or items == 1:
        return by_seed + by_item, max(seeds, items) - 1
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0, keepdims=True) + x.mean()
    error = float((rest**2).sum()) / ((seeds - 1) * (items - 1)) / (seeds * items)
    variance = max(by_seed + by_item - error, by_seed, by_item)
    if variance == 0:
        return 0.0, 1.0
    return variance, variance**2 / (by_seed**2 / (seeds - 1) + by_item**2 / (items - 1))


def _nested(rows: list[NDArray[np.float64]]) -> tuple[float, float]:
    seeds = len(rows)
    between = float(np.var([row.mean() for row in rows], ddof=1)) / seeds
    within = sum(float(row.var(ddof=1)) / row.size for row in rows if row.size > 1) / seeds**2
    if between >= within:
        return between, seeds - 1
    return within, sum(row.size for row in rows) - seeds
