"""Intervals as short texts and as cells of tables, with what they mean: a gain, a loss, or noise."""

from __future__ import annotations

import math

from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.page import Cell, Tone

TONES: dict[str, Tone] = {"gain": "gain", "loss": "loss", "within noise": "noise"}


def percent(interval: Interval) -> str:
    """``48.1 % [44.0, 52.2]``"""
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval: Interval) -> str:
    """``+2.3 points [−0.4, +5.0]``"""
    estimate, low, high = (_signed(100 * value) for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate} points [{low}, {high}]"


def verdict(interval: Interval) -> str:
    """``gain``, ``loss`` or ``within noise``: which side of zero the interval lies on, if any."""
    if not interval.excludes_zero:
        return "within noise"
    return "gain" if interval.estimate > 0 else "loss"


def share_cell(interval: Interval) -> Cell:
    """``48.1 %``, with its interval."""
    return Cell(f"{100 * interval.estimate:.1f} %", f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]")


def difference_cell(interval: Interval) -> Cell:
    """``+2.3``, with its interval, toned by what it means."""
    estimate, _, rest = points(interval).partition(" points ")
    return Cell(estimate, rest, TONES[verdict(interval)])


def ratio_cell(log_ratio: Interval) -> Cell:
    """A ratio of perplexities in percent; below zero is a gain."""
    estimate, low, high = (
        f"{100 * math.expm1(value):+.1f}".replace("-", "−")
        for value in (log_ratio.estimate, log_ratio.low, log_ratio.high)
    )
    meant = verdict(Interval(-log_ratio.estimate, -log_ratio.high, -log_ratio.low))
    return Cell(f"{estimate} %", f"[{low}, {high}]", TONES[meant])


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
