"""The layer area [forward, backward): where the languages' subspaces lie closest to the pivot's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from shifcon_fast.space.language_space import LanguageSpace


@dataclass(frozen=True)
class Area:
    """A recommended layer area, with what it was chosen from.

    Attributes:
        forward: the boundary where hidden states shift toward the pivot; ≥ 1.
        backward: the boundary where they shift back; forward < backward ≤ L − 1.
        distances: D to the pivot at each boundary, averaged over the other languages; NaN where not estimated.
        floor: noise floor at each boundary, averaged over the other languages, from halves of the sentences.
        split_distances: D to the pivot between such halves: what is comparable with ``floor``.
        reason: one sentence with the figures.
    """

    forward: int
    backward: int
    distances: list[float]
    floor: list[float]
    split_distances: list[float]
    reason: str

    def __post_init__(self) -> None:
        count = len(self.distances)
        if not 0 <= self.forward < self.backward <= count:
            raise ValueError(f"forward, backward: got {self.forward}, {self.backward} of {count} boundaries")
        if not len(self.floor) == len(self.split_distances) == count:
            raise ValueError(f"floor, split_distances: wanted one for each of {count} boundaries")


def recommend_area(
    space: LanguageSpace, *, tolerance: float = 0.1, min_width: int = 1, max_width: int | None = None
) -> Area:
    """The contiguous run of boundaries around the minimum of D in which D ≤ (1 + tolerance) · minimum.

    The first and the last boundary are never in the run: the embeddings are not contextual yet, and the last block
    already prepares the language-specific output. Of equal minima the first counts.

    Args:
        space: estimated with subspaces, at three or more boundaries.
        tolerance: how far above the minimum, as a share of it, a boundary of the area may lie; ≥ 0.
        min_width: a narrower run grows by its nearer neighbour, in distance D, until it has this many boundaries.
        max_width: a wider run loses the end with the larger D until it has this many.

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
    if min_width < 1 or (max_width is not None and max_width < min_width):
        raise ValueError(
            f"min_width, max_width: got {min_width}, {max_width}; wanted 1 <= min_width <= max_width"
        )
    if not space.bases:
        raise ValueError("space: has no subspaces; estimate it without subspaces=False to get distances")

    others = [language for language in space.languages if language != space.pivot]
    estimated = set(space.boundaries)
    distances, floor, split = [], [], []
    for k in range(last + 1):
        known = k in estimated
        distances.append(_mean([space.distance(k, o, space.pivot) for o in others]) if known else math.nan)
        floor.append(_mean([space.noise_floor(k, o) for o in others]) if known else math.nan)
        split.append(_mean([space.split_distance(k, o) for o in others]) if known else math.nan)

    inside = {k: distances[k] for k in range(1, last) if math.isfinite(distances[k])}
    if not inside:
        raise ValueError(
            f"space: no finite distance at the inner boundaries 1 … {last - 1}; estimated were {sorted(estimated)}"
        )
    best = min(inside, key=lambda k: (inside[k], k))
    limit = inside[best] * (1 + tolerance)
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

    area = Area(first, end, distances, floor, split, reason="")
    return replace(area, reason=_explain(area, best, tolerance, others))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _explain(area: Area, best: int, tolerance: float, others: list[str]) -> str:
    first, end, distances = area.forward, area.backward, area.distances
    inside = distances[first:end]
    outside = [d for k, d in enumerate(distances) if not first <= k < end and math.isfinite(d)]
    span = f"boundaries {first} to {end - 1}" if end - first > 1 else f"boundary {first}"
    sentence = (
        f"Shift toward the pivot at boundary {first} and back at boundary {end}: the distance to the pivot, "
        f"averaged over {', '.join(others)}, is smallest at boundary {best} ({distances[best]:.2f}) and "
        f"{min(inside):.2f} to {max(inside):.2f} at {span} (tolerance {tolerance:.0%})"
    )
    if outside:
        sentence += f", against {min(outside):.2f} to {max(outside):.2f} elsewhere"
    floor, split = area.floor[best], area.split_distances[best]
    if math.isnan(floor):
        return sentence + "; there are too few sentences for a noise floor (at least four a language)."
    sentence += f"; between halves of the sentences it is {split:.2f} there and the noise floor {floor:.2f}"
    if split <= floor:
        sentence += (
            ", so the distance cannot be told from noise: take more sentences before trusting the choice"
        )
    return sentence + "."
