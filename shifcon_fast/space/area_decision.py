"""Which of the swept areas to take, if any: behaviour decides where it was measured."""

from __future__ import annotations

import math

from shifcon_fast.space.sweep_result import AreaSweep, SweptArea


def decide(
    sweep: AreaSweep,
    *,
    alpha: float,
    max_perplexity_rise: float,
    min_width: int = 1,
    max_width: int | None = None,
) -> tuple[SweptArea | None, str]:
    """The area to take and one sentence with the figures; None where no area is worth the shift.

    An area passes if no language's perplexity rises by more than ``max_perplexity_rise``, no right answers are lost
    beyond noise, and something is gained: answers, or retrieval inside the area. Of those that pass, areas whose
    gain in answers is within one standard error of the largest count as equal (Breiman et al. 1984, *Classification
    and Regression Trees*, 3.4.3), and of equals the one with the largest gain in retrieval is taken.

    Args:
        alpha: only areas that were measured with this length of the shift.
        max_perplexity_rise: a share; 0.1 is 10 %.
        min_width, max_width: only areas of so many boundaries.

    Raises:
        ValueError: no area of that alpha and width was measured.
    """
    measured = [
        area
        for area in sweep.areas
        if area.alpha == alpha and min_width <= area.backward - area.forward <= (max_width or math.inf)
    ]
    if not measured:
        raise ValueError(
            f"alpha: got {alpha}; the sweep has {', '.join(f'{a:g}' for a in sweep.alphas) or 'no area'}"
            + (
                f" and no area of {min_width} to {max_width or '∞'} boundaries"
                if alpha in sweep.alphas
                else ""
            )
            + f". Sweep with `--alpha {alpha:g}`, or give the area (--forward, --backward)"
        )
    passing = [area for area in measured if passes(sweep, area, max_perplexity_rise)]
    if not passing:
        return None, _none(sweep, measured, max_perplexity_rise)
    chosen = max(_equals_of_the_best(sweep, passing), key=lambda area: _retrieval_gain(sweep, area))
    return chosen, _chosen(sweep, chosen, len(passing), len(measured), max_perplexity_rise)


def passes(sweep: AreaSweep, area: SweptArea, max_perplexity_rise: float) -> bool:
    """Whether an area may be recommended; :func:`decide` says when."""
    if not sweep.worst(area)[1] <= 1 + max_perplexity_rise:
        return False
    accuracy = sweep.accuracy_change(area)
    if accuracy is not None and accuracy.interval[1] < 0:
        return False
    return (accuracy is not None and accuracy.estimate > 0) or _retrieval_gain(sweep, area) > 0


def _equals_of_the_best(sweep: AreaSweep, passing: list[SweptArea]) -> list[SweptArea]:
    changes = [sweep.accuracy_change(area) for area in passing]
    known = [
        (change.estimate, area) for change, area in zip(changes, passing, strict=True) if change is not None
    ]
    if not known:
        return passing
    best = max(known, key=lambda pair: pair[0])[1]
    equals = []
    for area in passing:
        behind = sweep.accuracy_change(area, than=best)
        assert behind is not None
        error = 0.0 if math.isnan(behind.error) else behind.error
        if behind.estimate >= -error:
            equals.append(area)
    return equals


def _retrieval_gain(sweep: AreaSweep, area: SweptArea) -> float:
    before, after = sweep.retrieval_change(area)
    return after - before


def _chosen(sweep: AreaSweep, area: SweptArea, passing: int, measured: int, rise: float) -> str:
    return (
        f"Shift toward the pivot at boundary {area.forward} and back at boundary {area.backward}{_length(area)}: "
        f"with the shift on and no training, {_effects(sweep, area)}. Gains "
        f"without a language's perplexity rising by more than {rise:.0%}: at {_share(passing, measured)}"
        f"{_unfinished(sweep)}."
    )


def _none(sweep: AreaSweep, measured: list[SweptArea], rise: float) -> str:
    mildest = min(measured, key=lambda area: sweep.worst(area)[1])
    within = [area for area in measured if sweep.worst(area)[1] <= 1 + rise]
    if within:
        why = (
            f"perplexity stays within {rise:.0%} in every language at {_share(len(within), len(measured))}, but "
            "none of these gains answers or retrieval without losing answers"
        )
    else:
        why = (
            f"a language's perplexity rises by more than {rise:.0%} at every area measured ({len(measured)})"
        )
    others = sorted(
        {area.alpha for area in sweep.areas if area.alpha != measured[0].alpha and passes(sweep, area, rise)}
    )
    hint = (
        f" With alpha {', '.join(f'{alpha:g}' for alpha in others)} there are areas that pass."
        if others
        else ""
    )
    return (
        "No area helps this model: train with `shift: false`. With the shift on and no training"
        f"{_length(measured[0])}, {why}; the mildest is [{mildest.forward}, {mildest.backward}), where "
        f"{_effects(sweep, mildest)}{_unfinished(sweep)}.{hint}"
    )


def _effects(sweep: AreaSweep, area: SweptArea) -> str:
    language, ratio = sweep.worst(area)
    before, after = sweep.retrieval_change(area)
    text = (
        f"perplexity changes most in {language} ({_percent(ratio)}), retrieval inside the area goes from "
        f"{100 * before:.1f} to {100 * after:.1f} %"
    )
    accuracy = sweep.accuracy_change(area)
    if accuracy is None:
        return text
    low, high = accuracy.interval
    said = f"right answers by {100 * accuracy.estimate:+.1f} points"
    if not math.isnan(low):
        noise = ", within noise" if low <= 0 <= high else ""
        said += f" (95 % interval {100 * low:+.1f} to {100 * high:+.1f}{noise})"
    return f"{text}, and {said}"


def _percent(ratio: float) -> str:
    """A ratio of perplexities as a change; as a factor where it is large."""
    return f"{100 * (ratio - 1):+.1f} %" if ratio < 2 else f"× {ratio:,.3g}"


def _length(area: SweptArea) -> str:
    return "" if area.alpha == 1 else f" with alpha {area.alpha:g}"


def _share(some: int, all_: int) -> str:
    return f"{some} of the {all_} areas measured"


def _unfinished(sweep: AreaSweep) -> str:
    left = len(sweep.missing)
    if not left:
        return ""
    return f"; the sweep is unfinished, {left} more {'area is' if left == 1 else 'areas are'} to be measured"
