"""The sweep over layer areas of SmolLM2: a language's own text pays for the shift, and the decision sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shifcon_fast as sf
from shifcon_fast.data.cldr import cldr_rows
from shifcon_fast.evaluation.perplexity import measure_perplexity
from shifcon_fast.modeling.attach import attach
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import AreaSweep

pytestmark = pytest.mark.timeout(900)  # a real model on a busy machine

LANGUAGES = ("en", "de", "sw")
AREAS = [(5, 10), (10, 20), (20, 25)]


@pytest.fixture(scope="module")
def sentences(shifcon_data: Path) -> list[dict[str, str]]:
    lines = (shifcon_data / "ntrex128.jsonl").read_text(encoding="utf-8").splitlines()[::60]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def space(_smollm2_once: Any, sentences: list[dict[str, str]]) -> LanguageSpace:
    text = {code: [row[code] for row in sentences[:12]] for code in LANGUAGES}
    model, tokenizer = _smollm2_once.model, _smollm2_once.tokenizer
    return sf.estimate_space(model, tokenizer, text, subspaces=False, progress=False)


@pytest.fixture(scope="module")
def text(sentences: list[dict[str, str]]) -> dict[str, list[str]]:
    return {code: [row[code] for row in sentences[12:15]] for code in LANGUAGES}


@pytest.fixture(scope="module")
def swept(
    _smollm2_once: Any, space: LanguageSpace, text: dict[str, list[str]], tmp_path_factory: Any
) -> AreaSweep:
    return sf.sweep_area(
        _smollm2_once.model,
        _smollm2_once.tokenizer,
        space,
        text,
        cldr_rows(LANGUAGES, split="dev", kinds=("language",)),
        areas=AREAS,
        max_questions=4,
        output=tmp_path_factory.mktemp("sweep"),
        progress=False,
    )


def test_the_shift_costs_perplexity_but_does_not_destroy_the_model(swept: AreaSweep) -> None:
    ratios = {area.candidate[:2]: swept.worst(area)[1] for area in swept.areas}
    assert list(ratios) == AREAS
    assert all(1.0 < ratio < 10 for ratio in ratios.values()), ratios  # with sinks in the vectors: thousands
    assert ratios[10, 20] > 1.1


def test_the_decision_is_by_what_was_measured(swept: AreaSweep, space: LanguageSpace) -> None:
    assert space.sweep is swept
    within = [each.candidate[:2] for each in swept.areas if swept.worst(each)[1] <= 1.1]
    assert sf.recommend_area(space).span in (None, *within)
    assert sf.recommend_area(space, max_perplexity_rise=0.0).span is None


def test_the_figures_are_those_of_the_attached_model(
    open_smollm2: Any, swept: AreaSweep, space: LanguageSpace, text: dict[str, list[str]]
) -> None:
    area = next(each for each in swept.areas if each.candidate == (20, 25, 1.0))
    with attach(open_smollm2.model, space, 20, 25) as handle:
        measured = measure_perplexity(
            open_smollm2.model, open_smollm2.tokenizer, text["sw"], language="sw", handle=handle
        )
    assert area.nll["sw"] == pytest.approx(measured.nll, rel=1e-4)
    assert len(swept.rows["sw"]) == len(swept.right["en"]) == len(area.right["sw"]) == 4
    assert all(0 < dose < 1 for dose in area.dose["de"] + area.dose["sw"])
