"""What a sweep over areas says: figures, decision, file. The measurements are made up."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shifcon_fast.space.area import propose_area, recommend_area
from shifcon_fast.space.area_decision import decide
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import (
    FILE_NAME,
    AreaSweep,
    Nats,
    ShiftedRetrieval,
    SweptArea,
)

TOKENS = {"de": [10, 30], "sw": [20, 20]}
UNSHIFTED: dict[str, Any] = {"de": [20.0, 60.0], "sw": [60.0, 60.0]}
ROWS = list(range(8))
HALF = [True, False] * 4


def swept(
    forward: int,
    backward: int,
    *,
    de: float = 1.0,
    sw: float = 1.0,
    right: dict[str, list[bool]] | None = None,
    alpha: float = 1.0,
) -> SweptArea:
    """An area at which perplexities are so many times the unshifted ones."""
    nll: dict[str, Nats] = {}
    for language, ratio in (("de", de), ("sw", sw)):
        more = math.log(ratio)
        nll[language] = [
            None if math.isinf(more) else before + more * tokens
            for before, tokens in zip(UNSHIFTED[language], TOKENS[language], strict=True)
        ]
    return SweptArea(forward, backward, alpha, {"de": [0.2, 0.3], "sw": [0.4, 0.5]}, nll, right or {})


def sweep_of(
    *areas: SweptArea, gains: dict[int, float] | None = None, asked: bool = False, planned: int = 0
) -> AreaSweep:
    """A sweep of a model with seven blocks. ``gains``: forward → what retrieval gains at its boundaries."""
    unchanged = {"de": HALF, "sw": HALF} if asked else {}
    areas = tuple(replace(area, right=area.right or unchanged) for area in areas)
    flat: Any = {name: [0.5] * 6 for name in ("to_pivot", "from_pivot", "mexa")}
    shifted = []
    for forward, alpha in dict.fromkeys((area.forward, area.alpha) for area in areas):
        level = 0.5 + (gains or {}).get(forward, 0.1)
        of_one: Any = {name: [level] * (6 - forward) for name in flat}
        shifted.append(ShiftedRetrieval(forward, alpha, {"de": of_one, "sw": of_one}))
    return AreaSweep(
        pivot="en",
        languages=["de", "sw"],
        num_boundaries=7,
        max_perplexity_rise=0.1,
        identity={"vectors_sha256": "0"},
        planned=[area.candidate for area in areas] + [(1, 2, float(k + 7)) for k in range(planned)],
        tokens=TOKENS,
        nll=UNSHIFTED,
        rows={"en": ROWS, "de": ROWS, "sw": ROWS} if asked else {},
        right={"en": [True] * 8, **unchanged} if asked else {},
        retrieval={"de": flat, "sw": flat},
        shifted_retrieval=shifted,
        areas=list(areas),
        seconds=12.5,
    )


# --- figures ----------------------------------------------------------------------------------------------------


def test_perplexities_and_the_worst_language() -> None:
    area = swept(2, 4, de=1.25, sw=3.0)
    sweep = sweep_of(area)
    assert sweep.perplexity("de") == pytest.approx(math.exp(2))
    assert sweep.perplexity("de", area) == pytest.approx(1.25 * math.exp(2))
    assert sweep.perplexity_ratio(area, "de") == pytest.approx(1.25)
    assert sweep.worst(area) == ("sw", pytest.approx(3.0))


@pytest.mark.parametrize("nats", [None, 1e6])
def test_a_destroyed_language_is_the_worst_whatever_its_number(nats: float | None) -> None:
    area = swept(2, 4, de=1.25)
    area.nll["sw"][1] = nats
    assert sweep_of(area).worst(area) == ("sw", math.inf)


def test_retrieval_is_averaged_over_the_boundaries_of_the_area() -> None:
    area = swept(2, 4)
    sweep = sweep_of(area)
    sweep.retrieval["de"] = {
        "to_pivot": [9, 9, 0.1, 0.3, 9, 9],
        "from_pivot": [9, 9, 0.2, 0.4, 9, 9],
        "mexa": [9, 9, 0.0, 0.2, 9, 9],
    }
    sweep.shifted_retrieval[0].scores["de"] = {
        "to_pivot": [0.5, 0.7, 9, 9],
        "from_pivot": [0.6, 0.8, 9, 9],
        "mexa": [0.4, 0.6, 9, 9],
    }
    sweep.languages = ["de"]
    assert sweep.retrieval_change(area) == pytest.approx((0.25, 0.65))
    assert sweep.retrieval_change(area, "mexa") == pytest.approx((0.1, 0.5))


def test_answers_are_paired_by_question_and_languages_of_a_question_count_once() -> None:
    right = {"de": [True] * 4 + HALF[4:], "sw": HALF}
    area = swept(2, 4, right=right)
    sweep = sweep_of(area, asked=True)
    assert (sweep.accuracy("de"), sweep.accuracy("de", area)) == (0.5, 0.75)
    of_de, of_all = sweep.accuracy_change(area, "de"), sweep.accuracy_change(area)
    assert of_de is not None
    assert of_all is not None
    assert of_de.estimate == pytest.approx(0.25)
    differences = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0]).double() / 2  # mean of de and sw, by question
    assert of_all.estimate == pytest.approx(float(differences.mean()))
    assert of_all.error == pytest.approx(float(differences.std() / 8**0.5))
    assert sweep.accuracy_change(area, than=area).estimate == 0  # type: ignore[union-attr]
    assert sweep_of(swept(2, 4)).accuracy_change(swept(2, 4)) is None


# --- the decision -----------------------------------------------------------------------------------------------


def better(count: int) -> dict[str, list[bool]]:
    """So many more right answers, in both languages."""
    right = [answer or index < 2 * count for index, answer in enumerate(HALF)]
    return {"de": right, "sw": right}


WORSE = {"de": [False] * 8, "sw": [False] * 8}


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        (sweep_of(swept(1, 3), swept(2, 4), gains={2: 0.2}), (2, 4)),  # without questions: retrieval
        (
            sweep_of(swept(1, 3), swept(2, 4, sw=1.11), gains={2: 0.2}),
            (1, 3),
        ),  # but never beyond the stated rise
        (sweep_of(swept(1, 3), swept(2, 4, de=math.inf), gains={2: 0.2}), (1, 3)),
        (
            sweep_of(swept(1, 3, right=better(3)), swept(2, 4, right=better(0)), gains={2: 0.2}, asked=True),
            (1, 3),
        ),
        # within a standard error of the most answers: retrieval again
        (
            sweep_of(swept(1, 3, right=better(3)), swept(2, 4, right=better(2)), gains={2: 0.2}, asked=True),
            (2, 4),
        ),
        (
            sweep_of(swept(1, 3, right=WORSE), swept(2, 4, right=better(0)), gains={1: 0.2}, asked=True),
            (2, 4),
        ),
        (sweep_of(swept(1, 3), swept(2, 4), gains={1: -0.1, 2: 0.01}), (2, 4)),
    ],
)
def test_decision(sweep: AreaSweep, expected: tuple[int, int]) -> None:
    area, reason = decide(sweep, alpha=1.0, max_perplexity_rise=0.1)
    assert area is not None
    assert (area.forward, area.backward) == expected
    assert f"at boundary {expected[0]} and back at boundary {expected[1]}:" in reason


@pytest.mark.parametrize(
    ("sweep", "why"),
    [
        (
            sweep_of(swept(1, 3, de=3.0), swept(2, 4, de=1.2, sw=1.4)),
            "perplexity rises by more than 10% at every area measured (2); the mildest is [2, 4), where "
            "perplexity changes most in sw (+40.0 %), retrieval inside the area goes from 50.0 to 60.0 %.",
        ),
        (
            sweep_of(swept(1, 3), gains={1: 0.0}),
            "stays within 10% in every language at 1 of the 1 areas measured, but none of these gains answers",
        ),
        (sweep_of(swept(1, 3, right=WORSE), asked=True), "without losing answers"),
        (sweep_of(swept(1, 3, de=1e5)), "changes most in de (× 1e+05)"),
        (sweep_of(swept(1, 3, de=2), planned=3), "the sweep is unfinished, 3 more areas are to be measured"),
        (sweep_of(swept(1, 3, de=2), swept(1, 3, alpha=0.5)), "With alpha 0.5 there are areas that pass."),
    ],
)
def test_no_area_is_an_answer(sweep: AreaSweep, why: str) -> None:
    area, reason = decide(sweep, alpha=1.0, max_perplexity_rise=0.1)
    assert area is None
    assert reason.startswith("No area helps this model: train with `shift: false`.")
    assert why in reason


def test_the_reason_of_a_choice_has_the_figures() -> None:
    sweep = sweep_of(swept(1, 3, de=0.95, sw=1.05, right=better(1)), swept(2, 4, de=2), asked=True, planned=1)
    assert decide(sweep, alpha=1.0, max_perplexity_rise=0.1)[1] == (
        "Shift toward the pivot at boundary 1 and back at boundary 3: with the shift on and no training, "
        "perplexity changes most in sw (+5.0 %), retrieval inside the area goes from 50.0 to 60.0 %, and right "
        "answers by +12.5 points (95 % interval -12.0 to +37.0, within noise). Gains without a language's "
        "perplexity rising by more than 10%: at 1 of the 2 areas measured; the sweep is unfinished, 1 more area is "
        "to be measured."
    )


def test_an_alpha_or_a_width_that_was_not_measured_is_refused() -> None:
    sweep = sweep_of(swept(1, 3))
    with pytest.raises(ValueError, match=r"alpha: got 0.5; the sweep has 1\. Sweep with `--alpha 0.5`"):
        decide(sweep, alpha=0.5, max_perplexity_rise=0.1)
    with pytest.raises(ValueError, match="no area of 3 to ∞ boundaries"):
        decide(sweep, alpha=1.0, max_perplexity_rise=0.1, min_width=3)


# --- with a language space --------------------------------------------------------------------------------------


@pytest.fixture
def space() -> LanguageSpace:
    """Seven boundaries, with distances that are smallest at boundary 3."""
    mean = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))
    bases = {(k, code): torch.eye(4)[:, :1] for k in range(7) for code in ("en", "de", "sw")}
    variances = {(k, code): torch.tensor([1.0 if code == "en" else 2.0 + abs(k - 3)]) for k, code in bases}
    return LanguageSpace(
        ("en", "de", "sw"),
        "en",
        mean,
        dict.fromkeys(("en", "de", "sw"), 10),
        torch.ones(7),
        torch.ones(7, 3),
        torch.zeros(7, 3),
        bases=bases,
        variances=variances,
        ridge=torch.ones(7, dtype=torch.float64),
        floors=torch.full((7, 3), 0.1),
        split_distances=torch.full((7, 3), 1.0),
    )


def of(space: LanguageSpace, sweep: AreaSweep) -> AreaSweep:
    sweep.identity = {"vectors_sha256": space.vectors_sha256}
    return sweep


def test_the_recommendation_goes_by_the_sweep(space: LanguageSpace) -> None:
    proposed = recommend_area(space)
    assert proposed == propose_area(space)
    area = recommend_area(space, sweep=of(space, sweep_of(swept(1, 3), swept(4, 6, de=2))))
    assert area.span == (1, 3)
    assert area.distances == proposed.distances  # still there, for the picture
    space.sweep = of(space, sweep_of(swept(1, 3, de=1.3)))
    none = recommend_area(space)
    assert (none.forward, none.backward, none.span) == (None, None, None)
    assert recommend_area(space, max_perplexity_rise=0.5).span == (1, 3)
    space.sweep.max_perplexity_rise = 0.4
    assert recommend_area(space).span == (1, 3)


def test_a_sweep_needs_no_subspaces(space: LanguageSpace) -> None:
    space.bases, space.variances = {}, {}
    area = recommend_area(space, sweep=of(space, sweep_of(swept(1, 3))))
    assert area.span == (1, 3)
    assert len(area.distances) == 7


def test_a_sweep_of_other_vectors_is_refused(space: LanguageSpace) -> None:
    sweep = of(space, sweep_of(swept(1, 3)))
    space.sweep = sweep
    moved = space.replace_means(space.mean + 1e-3)
    assert moved.sweep is None
    with pytest.raises(ValueError, match="other language vectors than this space's"):
        recommend_area(moved, sweep=sweep)


def test_a_space_is_loaded_with_the_sweep_beside_it(space: LanguageSpace, tmp_path: Path) -> None:
    sweep = of(space, sweep_of(swept(1, 3)))
    space.save(tmp_path)
    assert LanguageSpace.load(tmp_path).sweep is None
    sweep.save(tmp_path)
    assert recommend_area(LanguageSpace.load(tmp_path)).span == (1, 3)


# --- the file ---------------------------------------------------------------------------------------------------


def test_the_file_gives_back_the_sweep(tmp_path: Path) -> None:
    sweep = sweep_of(
        swept(1, 3, right=better(2)),
        swept(2, 4, de=math.inf, alpha=0.5, right=better(1)),
        asked=True,
        planned=2,
    )
    path = sweep.save(tmp_path)
    found = AreaSweep.load(tmp_path)
    assert vars(found) == vars(sweep)
    assert vars(AreaSweep.load(path)) == vars(sweep)
    text = path.read_text()
    assert not re.search("Infinity|NaN", text)  # which JSON does not have
    assert json.loads(text)["summary"][1]["worst_perplexity_ratio"] is None
    assert found.missing == sweep.planned[2:]


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda value: value.pop(key)


@pytest.mark.parametrize(
    "damage",
    [
        _without("tokens"),
        _without("areas"),
        lambda value: value.update(format_version=2),
        lambda value: value.update(kind="evaluation"),
        lambda value: value.update(planned=[[1]]),
        lambda value: value.update(areas=[{"forward": 1}]),
        lambda value: value.update(areas=17),
        lambda value: value.update(retrieval={}),
        lambda value: value.update(languages=["tr"]),
        lambda value: value.update(tokens={"de": [], "sw": []}),
        lambda value: value.update(nll={"de": "x", "sw": "y"}),
        lambda value: value["areas"][0].update(right={"de": [True]}),
        lambda value: value.update(shifted_retrieval=[]),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    damage: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    path = sweep_of(swept(1, 3, right=better(2)), asked=True).save(tmp_path)
    value = json.loads(path.read_text())
    damage(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=FILE_NAME):
        AreaSweep.load(tmp_path)
