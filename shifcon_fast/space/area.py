"""The layer area [forward, backward): proposed by the subspace distance, decided by a sweep where there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from shifcon_fast.space.area_decision import decide
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import FILE_NAME, AreaSweep


@dataclass(frozen=True)
class Area:
    """A recommended layer area, with what it was chosen from.

    Attributes:
        forward: the boundary where hidden states shift toward the pivot; ≥ 1. None if a sweep found that no area
            helps.
        backward: the boundary where they shift back; forward < backward ≤ L − 1. None with ``forward``.
        distances: D to the pivot at each boundary, averaged over the other languages; NaN where not estimated.
        floor: noise floor at each boundary, averaged over the other languages, from halves of the sentences.
        split_distances: D to the pivot between such halves: what is comparable with ``floor``.
        excess: how far the languages lie from the pivot above noise, ``LanguageSpace.excess_distance`` averaged
            over the other languages: what the area is chosen by.
        reason: one sentence with the figures.
    """

    forward: int | None
    backward: int | None
    distances: list[float]
    floor: list[float]
    split_distances: list[float]
    excess: list[float]
    reason: str

    def __post_init__(self) -> None:
        count = len(self.distances)
        if (self.forward is None) != (self.backward is None):
            raise ValueError(f"forward, backward: got {self.forward}, {self.backward}; wanted two or none")
        if self.span is not None and not 0 <= self.span[0] < self.span[1] <= count:
            raise ValueError(f"forward, backward: got {self.forward}, {self.backward} of {count} boundaries")
        if not len(self.floor) == len(self.split_distances) == count:
            raise ValueError(f"floor, split_distances: wanted one for each of {count} boundaries")

    @property
    def span(self) -> tuple[int, int] | None:
        """(forward, backward), or None where no area helps."""
        return None if self.forward is None or self.backward is None else (self.forward, self.backward)


def propose_area(
    space: LanguageSpace,
    *,
    tolerance: float = 0.1,
    min_width: int | None = None,
    max_width: int | None = None,
) -> Area:
    """The contiguous run of boundaries around the minimum of E in which E ≤ (1 + tolerance) · minimum.

    E is the excess distance, which compares between boundaries; with fewer than four sentences a language there is
    no floor to set a distance against, and D itself takes its place.

    The first and the last boundary are never in the run: the embeddings are not contextual yet, and the last block
    already prepares the language-specific output. Of equal minima the first counts.

    Args:
        space: estimated with subspaces, at three or more boundaries.
        tolerance: how far above the minimum, as a share of it, a boundary of the area may lie; ≥ 0.
        min_width: a narrower run grows by its nearer neighbour, in E, until it has this many boundaries. None takes
            a sixth of the blocks: what a single block does to a shifted state is hardly what the method means.
        max_width: a wider run loses the end with the larger E until it has this many.

    Raises:
        ValueError: a space without subspaces, too few boundaries, no finite distance inside, widths that cannot be.
    """
    last = space.num_boundaries - 1
    if last < 2:
        raise ValueError(
            f"space: has {space.num_boundaries} boundaries; an area needs at least 3, for the first and the last "
            "are never in it"
        )
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: got {tolerance}; wanted a finite share of the minimum, 0 or more")
    if min_width is None:
        min_width = min(math.ceil(space.num_boundaries / 6), max_width or space.num_boundaries)
    if min_width < 1 or (max_width is not None and max_width < min_width):
        raise ValueError(
            f"min_width, max_width: got {min_width}, {max_width}; wanted 1 <= min_width <= max_width"
        )
    if not space.bases:
        raise ValueError("space: has no subspaces; estimate it without subspaces=False to get distances")

    others = [language for language in space.languages if language != space.pivot]
    estimated = set(space.boundaries)
    distances, floor, split, excess = [], [], [], []
    for k in range(last + 1):
        known = k in estimated
        distances.append(_mean([space.distance(k, o, space.pivot) for o in others]) if known else math.nan)
        floor.append(_mean([space.noise_floor(k, o) for o in others]) if known else math.nan)
        split.append(_mean([space.split_distance(k, o) for o in others]) if known else math.nan)
        excess.append(_mean([space.excess_distance(k, o) for o in others]) if known else math.nan)

    has_floor = all(math.isfinite(excess[k]) for k in estimated)
    measure = excess if has_floor else distances
    inside = {k: measure[k] for k in range(1, last) if math.isfinite(measure[k])}
    if not inside:
        raise ValueError(
            f"space: no finite distance at the inner boundaries 1 … {last - 1}; estimated were {sorted(estimated)}"
        )
    best = min(inside, key=lambda k: (inside[k], k))
    limit = max(inside[best], 0.0) * (1 + tolerance)  # below 0 is noise: nothing to be nearer to than that
    first, end = best, best + 1
    while first - 1 in inside and inside[first - 1] <= limit:
        first -= 1
    while end in inside and inside[end] <= limit:
        end += 1
    while end - first < min_width:
        below, above = inside.get(first - 1, math.inf), inside.get(end, math.inf)
        if math.isinf(below) and math.isinf(above):
            raise ValueError(
                f"min_width: got {min_width}, but only {end - first} neighbouring inner boundaries were estimated"
            )
        first, end = (first - 1, end) if below <= above else (first, end + 1)
    while max_width is not None and end - first > max_width:
        # Never past the minimum itself.
        drop_first = end - 1 == best or (first != best and inside[first] >= inside[end - 1])
        first, end = (first + 1, end) if drop_first else (first, end - 1)

    area = Area(first, end, distances, floor, split, excess, reason="")
    return replace(area, reason=_explain(area, best, tolerance, others))


def _check_belongs(sweep: AreaSweep, space: LanguageSpace) -> None:
    if not sweep.is_of(space.vectors_sha256):
        raise ValueError(
            f"sweep: it was made with other language vectors than this space's; sweep again (`shifcon sweep "
            f"--overwrite`), or delete its {FILE_NAME}"
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _explain(area: Area, best: int, tolerance: float, others: list[str]) -> str:
    assert area.span is not None
    first, end = area.span
    measured_by_excess = math.isfinite(area.excess[best])
    measure = area.excess if measured_by_excess else area.distances
    name = "excess distance" if measured_by_excess else "distance"
    show = "{:.0%}".format if measured_by_excess else "{:.2f}".format
    inside = measure[first:end]
    outside = [d for k, d in enumerate(measure) if not first <= k < end and math.isfinite(d)]
    span = f"boundaries {first} to {end - 1}" if end - first > 1 else f"boundary {first}"
    sentence = (
        f"Shift toward the pivot at boundary {first} and back at boundary {end}: the {name} to the pivot, averaged "
        f"over {', '.join(others)}, is smallest at boundary {best} ({show(measure[best])}) and "
        f"{show(min(inside))} to {show(max(inside))} at {span} (tolerance {tolerance:.0%})"
    )
    if outside:
        sentence += f", against {show(min(outside))} to {show(max(outside))} elsewhere"
    if not measured_by_excess:
        return sentence + "; there are too few sentences for a noise floor (at least four a language)."
    floor, split = area.floor[best], area.split_distances[best]
    sentence += (
        f"; between halves of the sentences the distance is {split:.2f} there and the noise floor {floor:.2f}"
    )
    if split <= floor:
        sentence += (
            ", so the distance cannot be told from noise: take more sentences before trusting the choice"
        )
    return sentence + ". What a shift does there, `shifcon sweep` measures."


def recommend_area(
    space: LanguageSpace,
    *,
    sweep: AreaSweep | None = None,
    alpha: float = 1.0,
    max_perplexity_rise: float | None = None,
    tolerance: float = 0.1,
    min_width: int | None = None,
    max_width: int | None = None,
) -> Area:
    """The layer area to shift in: what a sweep decides, or what :func:`propose_area` proposes where there is none.

    The proposal knows the geometry only; a sweep has seen what the shift does to the model's text and answers
    (:func:`~shifcon_fast.space.area_decision.decide` says how it decides). If no area passes, ``forward`` and
    ``backward`` are None and ``reason`` says why.

    Args:
        sweep: what :func:`shifcon_fast.sweep_area` returned for this space; None takes ``space.sweep``, which
            ``sweep_area`` sets and ``LanguageSpace.load`` reads.
        alpha: length of the shift; the sweep must have measured it.
        max_perplexity_rise: the largest share by which an area may raise any language's perplexity; None takes the
            sweep's.
        tolerance: see :func:`propose_area`.
        min_width, max_width: only areas of so many boundaries. Without ``min_width`` a proposal has at least a
            sixth of the blocks, and of a sweep every area counts.

    Raises:
        ValueError: the sweep is of other language vectors or has not measured ``alpha``; for a proposal, as
            :func:`propose_area`.
    """
    sweep = sweep if sweep is not None else space.sweep
    proposal: dict[str, Any] = {"tolerance": tolerance, "min_width": min_width, "max_width": max_width}
    if sweep is None:
        return propose_area(space, **proposal)
    _check_belongs(sweep, space)
    rise = sweep.max_perplexity_rise if max_perplexity_rise is None else max_perplexity_rise
    chosen, reason = decide(
        sweep, alpha=alpha, max_perplexity_rise=rise, min_width=min_width or 1, max_width=max_width
    )
    if space.bases:
        measured = propose_area(space, **proposal)
    else:  # a sweep needs no subspaces
        unknown = [math.nan] * space.num_boundaries
        measured = Area(None, None, unknown, unknown, unknown, unknown, reason)
    return replace(
        measured,
        forward=chosen.forward if chosen is not None else None,
        backward=chosen.backward if chosen is not None else None,
        reason=reason,
    )
