"""The layer area, on spaces whose distances are set by hand."""

from __future__ import annotations

import math

import pytest
import torch

from shifcon_fast.space.area import recommend_area
from shifcon_fast.space.language_shift import dose_warning
from shifcon_fast.space.language_space import LanguageSpace

NAN = float("nan")


def space_with(*excess: list[float], floor: float = 2.0, d_per_excess: float = 0.1) -> LanguageSpace:
    """One list of excess distances to the pivot per language; NaN leaves a boundary out.

    With one direction, variance v, ε = 1 and a pivot without variance, D = log(1 + v); here D is ``d_per_excess``
    times the excess.
    """
    distances = [[d_per_excess * value for value in values] for values in excess]
    languages = ("en", "de", "sw", "tr")[: len(distances) + 1]
    length, d = len(distances[0]), 4
    bases, variances = {}, {}
    mean = torch.zeros(length, len(languages), d)
    for k in range(length):
        if math.isnan(distances[0][k]):
            mean[k] = NAN
            continue
        for language, values in zip(languages, ([0.0] * length, *distances), strict=True):
            bases[k, language] = torch.eye(d)[:, :1]
            variances[k, language] = torch.tensor([math.expm1(values[k])])
    shape = (length, len(languages))
    split = floor * (1 + torch.tensor([[0.0, *row] for row in zip(*excess, strict=True)]))
    return LanguageSpace(
        languages,
        "en",
        mean,
        dict.fromkeys(languages, 10),
        torch.ones(length),
        torch.ones(shape),
        torch.zeros(shape),
        bases=bases,
        variances=variances,
        ridge=torch.ones(length, dtype=torch.float64),
        floors=torch.full(shape, floor),
        split_distances=split,
    )


def test_measures_are_averaged_over_the_other_languages() -> None:
    area = recommend_area(space_with([4, 3, 1, 3, 4], [6, 1, 2, 1, 6], floor=0.25, d_per_excess=1))
    assert area.excess == pytest.approx([5, 2, 1.5, 2, 5], rel=1e-5)
    assert area.distances == pytest.approx([5, 2, 1.5, 2, 5], rel=1e-5)
    assert area.floor == [0.25] * 5
    assert area.split_distances == pytest.approx([1.5, 0.75, 0.625, 0.75, 1.5], rel=1e-5)
    assert (area.forward, area.backward) == (2, 3)


def test_a_boundary_is_not_chosen_for_its_noise() -> None:
    """D is smallest at boundary 1, but so is its floor: above noise, the languages are farther apart there."""
    space = space_with([9, 2, 1, 2, 9], d_per_excess=1)
    assert space.floors is not None
    assert space.split_distances is not None
    space.floors[1] /= 10
    space.split_distances[1] /= 5
    assert space.split_distances[1, 1] < space.split_distances[2, 1]
    assert space.excess_distance(1, "de") == pytest.approx(5)
    area = recommend_area(space)
    assert (area.forward, area.backward) == (2, 3)


@pytest.mark.parametrize(
    ("distances", "options", "expected"),
    [
        ([9, 5, 2, 2.1, 2.15, 4, 9], {}, (2, 5)),
        ([9, 5, 2, 2.1, 2.3, 2.1, 9], {}, (2, 4)),  # contiguous: the dip behind the hill does not count
        ([9, 5, 2, 2.1, 2.3, 2.1, 9], {"tolerance": 0.2}, (2, 6)),
        ([9, 5, 2, 2.1, 2.3, 2.1, 9], {"tolerance": 0.0}, (2, 3)),
        ([0, 5, 4, 3, 2, 1, 0], {}, (5, 6)),  # neither first nor last, even where they are smallest
        ([3, 3, 3, 3, 3], {}, (1, 4)),
        ([0, 0, 0, 0], {}, (1, 3)),
        ([9, 1, 9], {}, (1, 2)),
        ([9, 1, 5, 1, 9], {}, (1, 2)),
        ([9, 8, 6, 2, 5, 7, 9], {"min_width": 3}, (2, 5)),
        ([9, 2, 6, 7, 8, 7, 9], {"min_width": 3}, (1, 4)),
        ([9, 3, 3, 3, 3, 3, 9], {"max_width": 2}, (1, 3)),
        ([9, 2.1, 2.05, 2.0, 2.05, 2.1, 9], {"max_width": 1}, (3, 4)),
        ([9, 2.0, 2.1, 2.05, 2.1, 9, 9], {"max_width": 2}, (1, 3)),
        ([9, 2.1, 2.0, 2.05, 9], {"max_width": 2}, (2, 4)),
        ([9, 2.05, 2.0, 2.1, 9], {"max_width": 2}, (1, 3)),
        ([9, 2.2, 2.1, NAN, 2.0, 2.1, 9], {}, (4, 6)),  # a boundary that was not estimated ends the run
        ([NAN, NAN, 2.1, 2.0, NAN], {}, (2, 4)),
    ],
)
def test_area(distances: list[float], options: dict[str, float], expected: tuple[int, int]) -> None:
    area = recommend_area(space_with(distances), **{"min_width": 1, **options})  # type: ignore[arg-type]
    assert (area.forward, area.backward) == expected
    assert area.excess == pytest.approx(distances, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("boundaries", "options", "width"),
    [(30, {}, 5), (18, {}, 3), (32, {}, 6), (4, {}, 1), (30, {"min_width": 1}, 1), (30, {"max_width": 2}, 2)],
)
def test_an_area_is_a_sixth_of_the_blocks_at_least_unless_asked_for(
    boundaries: int, options: dict[str, int], width: int
) -> None:
    excess = [5.0] * boundaries
    excess[boundaries // 2] = 1.0
    area = recommend_area(space_with(excess), **options)  # type: ignore[arg-type]
    assert area.backward - area.forward == width
    assert area.forward <= boundaries // 2 < area.backward


def test_the_reason_has_the_figures() -> None:
    reason = recommend_area(space_with([0.9, 0.5, 0.2, 0.21, 0.4, 0.9])).reason
    assert reason == (
        "Shift toward the pivot at boundary 2 and back at boundary 4: the excess distance to the pivot, averaged "
        "over de, is smallest at boundary 2 (20%) and 20% to 21% at boundaries 2 to 3 (tolerance 10%), against 40% "
        "to 90% elsewhere; between halves of the sentences the distance is 2.40 there and the noise floor 2.00. "
        "What a shift does there, `shifcon sweep` measures."
    )


def test_the_reason_says_when_the_distance_is_noise_or_the_floor_unknown() -> None:
    noise = recommend_area(space_with([9, -0.1, 9]))
    assert "so the distance cannot be told from noise: take more sentences" in noise.reason
    assert (noise.forward, noise.backward) == (1, 2)
    assert (
        recommend_area(space_with([9, -0.3, -0.1, 0.1, 9])).backward == 3
    )  # all that is noise is equally near
    unknown = recommend_area(space_with([9, 2, 9], floor=NAN))
    assert "there are too few sentences for a noise floor (at least four a language)." in unknown.reason
    assert "the distance to the pivot" in unknown.reason
    assert (unknown.forward, unknown.backward) == (1, 2)


@pytest.mark.parametrize(
    ("distances", "options", "message"),
    [
        ([1, 2], {}, "has 2 boundaries; an area needs at least 3"),
        ([1, NAN, 1], {}, r"no finite distance at the inner boundaries 1 … 1; estimated were \[0, 2\]"),
        ([1, 2, 1], {"tolerance": -0.1}, "tolerance: got -0.1"),
        ([1, 2, 1], {"tolerance": NAN}, "tolerance: got nan"),
        ([1, 2, 1], {"min_width": 0}, "got 0, None; wanted 1 <= min_width"),
        ([1, 2, 2, 1], {"min_width": 2, "max_width": 1}, "got 2, 1; wanted 1 <= min_width <= max_width"),
        ([1, 2, 2, 1], {"min_width": 3}, "min_width: got 3, but only 2 neighbouring"),
    ],
)
def test_area_refuses(distances: list[float], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommend_area(space_with(distances), **options)  # type: ignore[arg-type]


def test_a_dose_above_one_is_said_for_the_language_and_boundary_where_it_is_highest() -> None:
    space = space_with([2.0, 1.0, 1.0, 2.0], [2.0, 1.0, 1.0, 2.0])
    space.mean[1, 1] = torch.tensor([0.6, 0.0, 0.0, 0.0])
    space.mean[2, 1] = torch.tensor([1.5, 0.0, 0.0, 0.0])
    space.mean[:, 2] = 0.1
    assert dose_warning(space.shift(1, 3)) is None
    warning = dose_warning(space.shift(1, 2))
    assert warning is not None
    assert warning.startswith(
        "The shift of de is longer than a hidden state (alpha = 1; de at boundary 2: 1.5 times"
    )
    assert dose_warning(space.shift(1, 2, 0.5)) is None
    assert dose_warning(space.shift(1, 3, -2.0)) is not None


def test_a_shift_that_moves_next_to_nothing_is_said() -> None:
    space = space_with([2.0, 1.0, 1.0, 2.0], [2.0, 1.0, 1.0, 2.0])
    space.mean[1, 1] = torch.tensor([0.05, 0.0, 0.0, 0.0])
    space.mean[1, 2] = torch.tensor([0.002, 0.0, 0.0, 0.0])
    warning = dose_warning(space.shift(1, 2))
    assert warning is not None
    assert warning.startswith(
        "The shift of sw moves next to nothing (alpha = 1; sw: 0.002 of the median norm"
    )
    assert "take another area" in warning
    assert dose_warning(space.shift(1, 2, 10.0)) is None
    assert dose_warning(space.shift(1, 2, 0.0)) is None  # it was asked for
    official = dose_warning(space.shift(2, 3, recipe="official"))
    assert official is not None
    assert "recipe='stable' does not" in official
    space.mean[1, 1] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    both = dose_warning(space.shift(1, 2, 3.0))
    assert both is not None
    assert "sw moves next to nothing" in both
    assert "The shift of de is longer than a hidden state" in both


def test_area_needs_subspaces() -> None:
    space = LanguageSpace(
        ("en", "sw"), "en", torch.zeros(4, 2, 3), {"en": 2, "sw": 2}, torch.ones(4), *[torch.ones(4, 2)] * 2
    )
    with pytest.raises(ValueError, match="no subspaces"):
        recommend_area(space)
