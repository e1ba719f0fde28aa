"""Intervals against closed forms, exhaustive enumeration and simulated coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from shifcon_fast.evaluation.across_seeds import paired_seeds_interval, seeds_interval
from shifcon_fast.evaluation.bootstrap import (
    Interval,
    bootstrap_interval,
    paired_interval,
    ratio_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (1, 1), (41, 250), (125, 250)])
def test_wilson_is_the_closed_form(right: int, n: int) -> None:
    z, p = 1.959963984540054, right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = wilson_interval([1] * right + [0] * (n - right))
    assert interval.estimate == p
    assert interval.low == pytest.approx(max(0, centre - reach), abs=1e-12)
    assert interval.high == pytest.approx(min(1, centre + reach), abs=1e-12)


def test_a_half_right_test_of_250_is_known_to_six_points() -> None:
    interval = wilson_interval([0, 1] * 125)
    assert (interval.high - interval.low) / 2 == pytest.approx(0.0615, abs=1e-3)


def test_the_bootstrap_agrees_with_all_resamples_enumerated() -> None:
    values = [-1.0, 0.0, 0.0, 1.0, 1.0]
    means = np.array([np.mean(drawn) for drawn in itertools.product(values, repeat=5)])
    low, high = np.quantile(means, [0.05, 0.95])
    assert bootstrap_interval(values, confidence=0.9, resamples=20_000) == Interval(0.2, low, high)


def test_the_bootstrap_of_many_items_is_normal() -> None:
    outcomes = np.random.default_rng(3).integers(0, 2, size=4_000)
    interval = bootstrap_interval(outcomes)
    error = 1.96 * outcomes.std() / math.sqrt(outcomes.size)
    assert interval.estimate == outcomes.mean()
    assert interval.low == pytest.approx(outcomes.mean() - error, abs=0.05 * error)
    assert interval.high == pytest.approx(outcomes.mean() + error, abs=0.05 * error)


def test_a_ratio_is_weighted_by_its_denominators() -> None:
    """Three sentences, all 27 draws enumerated: Σ NLL / Σ tokens, not the mean of the sentences' ratios."""
    nll, tokens = np.array([1.0, 6.0, 2.0]), np.array([1.0, 2.0, 4.0])
    drawn = [list(indices) for indices in itertools.product(range(3), repeat=3)]
    low, high = np.quantile([nll[d].sum() / tokens[d].sum() for d in drawn], [0.05, 0.95])
    assert ratio_interval(nll, tokens, confidence=0.9, resamples=20_000) == Interval(9 / 7, low, high)
    with pytest.raises(ValueError, match=r"denominators holds 0\.0"):
        ratio_interval([1.0], [0.0])


def test_a_seed_fixes_the_interval_and_another_moves_it() -> None:
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_pairing_cancels_what_both_models_find_hard() -> None:
    generator = np.random.default_rng(2)
    second = generator.integers(0, 2, size=300)
    first = second.copy()
    first[np.flatnonzero(second == 0)[:12]] = 1
    paired = paired_interval(first, second)
    shuffled = paired_interval(first, generator.permutation(second))
    assert paired.estimate == pytest.approx(0.04)
    assert paired.excludes_zero
    assert not shuffled.excludes_zero
    assert paired.high - paired.low < 0.4 * (shuffled.high - shuffled.low)


def test_edges() -> None:
    assert bootstrap_interval([1.0]) == Interval(1.0, 1.0, 1.0)
    assert paired_interval([1, 1, 1], [1, 1, 1]) == Interval(0.0, 0.0, 0.0)
    assert paired_interval([0, 0], [1, 1]) == Interval(-1.0, -1.0, -1.0)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="first has 2 items and second 3"):
        paired_interval([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match=r"outcomes holds 0\.5"):
        wilson_interval([1, 0.5])
    with pytest.raises(ValueError, match=r"values has shape \(0,\)"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_interval([1, 0], confidence=95)
    with pytest.raises(ValueError, match="NaN"):
        bootstrap_interval([1, math.nan])


def table(x: np.ndarray, crossed: bool) -> dict[int, dict[object, float]]:
    return {s: {i if crossed else (s, i): float(v) for i, v in enumerate(row)} for s, row in enumerate(x)}


def test_seeds_by_hand() -> None:
    """Two seeds of four items, written out from the formulas of the module."""
    x = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    by_seed = np.var([0.75, 0.5], ddof=1) / 2
    by_item = np.var([1.0, 0.5, 0.0, 1.0], ddof=1) / 4
    residual = x - np.array([[0.75], [0.5]]) - np.array([1.0, 0.5, 0.0, 1.0]) + 0.625
    error = (residual**2).sum() / 3 / 8
    variance = by_seed + by_item - error
    freedom = variance**2 / (by_seed**2 / 1 + by_item**2 / 3)
    reach = student_t.ppf(0.975, freedom) * math.sqrt(variance)
    differences = paired_seeds_interval(table(x, crossed=True), table(np.zeros_like(x), crossed=True))
    assert differences.estimate == 0.625
    assert differences.high - 0.625 == pytest.approx(reach)
    assert 0.625 - differences.low == pytest.approx(reach)
    shares = seeds_interval(table(x, crossed=True))
    assert (shares.low, shares.high) == (max(0.0, 0.625 - reach), 1.0)  # shares stay between 0 and 1


def test_nested_seeds_use_students_t() -> None:
    x = np.array([[1.0] * 9 + [0.0], [1.0] * 5 + [0.0] * 5, [1.0] * 2 + [0.0] * 8])
    interval = seeds_interval(table(x, crossed=False))
    means = [0.9, 0.5, 0.2]
    reach = 4.302652729911275 * np.std(means, ddof=1) / math.sqrt(3)  # t(0.975, 2)
    assert interval.estimate == pytest.approx(np.mean(means))
    assert (interval.low, interval.high) == (0.0, 1.0)  # half-width 0.87: three such seeds say nothing
    signed = paired_seeds_interval(table(x, crossed=False), table(np.zeros_like(x), crossed=False))
    assert signed.high - signed.estimate == pytest.approx(reach)


def test_one_seed_is_an_interval_over_items() -> None:
    x = np.array([[1.0] * 30 + [0.0] * 10])
    wilson = wilson_interval(x[0])
    assert seeds_interval(table(x, crossed=True)) == wilson
    assert seeds_interval(
        {0: dict.fromkeys(range(20), 1.0), 1: dict.fromkeys(range(20), 1.0)}
    ) == wilson_interval([1] * 20)


def test_shares_that_are_means_get_an_interval_over_their_items() -> None:
    """One seed of averaged outcomes: Student's t over the items."""
    values = [0.5, 1.0, 0.25, 0.75, 0.5]
    interval = seeds_interval({0: dict(enumerate(values))})
    reach = student_t.ppf(0.975, 4) * np.std(values, ddof=1) / math.sqrt(5)
    assert interval.estimate == pytest.approx(0.6)
    assert interval.low == pytest.approx(0.6 - reach)
    assert interval.high == pytest.approx(0.6 + reach)
    with pytest.raises(ValueError, match=r"holds 1\.5; wanted shares"):
        seeds_interval({0: {1: 1.5}})


def test_equal_methods_differ_by_nothing() -> None:
    x = np.random.default_rng(0).integers(0, 2, size=(3, 20)).astype(float)
    assert paired_seeds_interval(table(x, True), table(x, True)) == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize("crossed", [True, False])
def test_the_interval_covers_the_truth_when_seeds_differ(crossed: bool) -> None:
    """400 experiments of 3 seeds with 6 points between them; an interval over items alone covers about 60 %."""
    generator = np.random.default_rng(5)
    covered = alone = 0
    for _ in range(400):
        right = 1 / (1 + np.exp(-generator.normal(0, 1.2, size=(1 if crossed else 3, 120))))
        effect = generator.normal(0, 0.06, size=(3, 1))
        before = (generator.random((3, 120)) < right).astype(float)
        after = (generator.random((3, 120)) < np.clip(right + effect, 0, 1)).astype(float)
        interval = paired_seeds_interval(table(after, crossed), table(before, crossed))
        covered += interval.low <= 0 <= interval.high
        differences = (after - before).ravel()
        alone += abs(differences.mean()) <= 1.96 * differences.std() / math.sqrt(differences.size)
    assert 0.92 <= covered / 400 <= 0.995
    assert alone / 400 < 0.85


def test_unpaired_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted the same seeds"):
        paired_seeds_interval({0: {1: 1.0}}, {1: {1: 1.0}})
    with pytest.raises(ValueError, match="different items with seed 0"):
        paired_seeds_interval({0: {1: 1.0}}, {0: {2: 1.0}})
    with pytest.raises(ValueError, match="no items for seed 7"):
        seeds_interval({7: {}})
