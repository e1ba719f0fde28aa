"""The sweep over areas of a tiny model: what it measures, how it goes on, what it refuses."""

from __future__ import annotations

import copy
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shifcon_fast as sf
from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation import area_effects
from shifcon_fast.evaluation import sweep_plot as plots
from shifcon_fast.evaluation.area_effects import EffectMeter
from shifcon_fast.evaluation.exact_match import answer_questions
from shifcon_fast.evaluation.multiple_choice import measure_multiple_choice
from shifcon_fast.evaluation.perplexity import Perplexity, measure_perplexity
from shifcon_fast.evaluation.report import report_folder
from shifcon_fast.evaluation.retrieval import measure_retrieval
from shifcon_fast.evaluation.sweep import candidate_areas, sweep_area
from shifcon_fast.evaluation.sweep_table import sweep_table
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.space.area import recommend_area
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import FILE_NAME, AreaSweep

QUESTIONS = [  # the first two with choices, the others to be generated
    Question(row, language, text.format(name), "Rome", ("Rome", "bread", "fish") if row < 2 else ())
    for row, name in enumerate(["Ada", "Ben", "Cem", "Dina"])
    for language, text in (("en", "{} lives in ?"), ("sw", "{} anaishi ?"))
]
OPTIONS: dict[str, Any] = {"sentences": 6, "max_new_tokens": 2, "progress": False}


@pytest.fixture
def space(own_space: LanguageSpace) -> LanguageSpace:
    """A copy: the sweep is put on it."""
    return copy.copy(own_space)


@pytest.fixture(scope="module")
def found(tiny_model, word_tokenizer, own_space, parallel_text) -> AreaSweep:
    model = tiny_model().train()
    swept = sweep_area(
        model, word_tokenizer, copy.copy(own_space), parallel_text, QUESTIONS, alpha=[1, 0.5], **OPTIONS
    )
    assert model.training  # as it was before
    assert not hasattr(model, "shifcon")
    return swept


@pytest.fixture(scope="module")
def text(parallel_text) -> dict[str, list[str]]:
    """Every fourth of 24 sentences: those that a sweep over six of them reads."""
    return {language: sentences[::4] for language, sentences in parallel_text.items()}


# --- what is measured -------------------------------------------------------------------------------------------


def test_perplexities_are_those_of_an_attached_model(found, tiny_model, word_tokenizer, space, text) -> None:
    area = found.areas[-1]
    assert area.candidate == (2, 3, 1.0)
    model = tiny_model()
    for language in ("de", "sw", "tr"):
        plain = measure_perplexity(model, word_tokenizer, text[language], language=language)
        assert (found.nll[language], found.tokens[language]) == (plain.nll, plain.tokens)
        with attach(model, space, 2, 3) as handle:
            shifted = measure_perplexity(
                model, word_tokenizer, text[language], language=language, handle=handle
            )
        assert area.nll[language] == pytest.approx(shifted.nll, rel=1e-6)
        assert area.nll[language] != pytest.approx(found.nll[language], rel=1e-3)


def test_retrieval_is_that_of_an_attached_model(found, tiny_model, word_tokenizer, space, text) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"pivot": "en", "boundaries": [1, 2], "matrix_boundary": 1}
    plain = measure_retrieval(model, word_tokenizer, text, **options)
    with attach(model, space, 1, 3, 0.5) as handle:
        shifted = measure_retrieval(model, word_tokenizer, text, handle=handle, **options)
    for language in ("de", "sw", "tr"):
        for name in ("to_pivot", "from_pivot", "mexa"):
            assert found.retrieval[language][name][1:] == getattr(plain.scores[language], name)
            assert found.retrieval_at(1, 0.5).scores[language][name] == getattr(
                shifted.scores[language], name
            )


def test_answers_are_those_of_an_attached_model(found, tiny_model, word_tokenizer, space) -> None:
    of_sw = [question for question in QUESTIONS if question.language == "sw"]
    assert found.rows == {"en": [0, 1, 2, 3], "sw": [0, 1, 2, 3]}
    assert set(found.right) == {"en", "sw"}
    model = tiny_model()
    with attach(model, space, 1, 3) as handle:
        outcomes = [
            *measure_multiple_choice(model, word_tokenizer, of_sw[:2], handle=handle),
            *answer_questions(model, word_tokenizer, of_sw[2:], handle=handle, max_new_tokens=2),
        ]
    area = next(area for area in found.areas if area.candidate == (1, 3, 1.0))
    assert area.right == {"sw": [outcome.correct for outcome in outcomes]}


def test_a_shift_that_destroys_the_model_is_measured_all_the_same(
    tiny_model, word_tokenizer, space, parallel_text, monkeypatch
) -> None:
    def overflowing(*given: Any, handle: Any, **options: Any) -> Perplexity:
        found = measure_perplexity(*given, handle=handle, **options)
        return found if handle is None else replace(found, nll=[math.nan, *found.nll[1:]])

    def asked(*given: Any, handle: Any, **options: Any) -> list[Any]:
        assert handle is None  # logits that are not finite answer nothing
        return measure_multiple_choice(*given, handle=handle, **options)

    monkeypatch.setattr(area_effects, "measure_perplexity", overflowing)
    monkeypatch.setattr(area_effects, "measure_multiple_choice", asked)
    found = sweep_area(
        *(tiny_model(), word_tokenizer, space, parallel_text, QUESTIONS), areas=[(1, 3)], **OPTIONS
    )
    area = found.areas[0]
    assert area.nll["sw"][0] is None
    assert found.worst(area)[1] == math.inf
    assert area.right == {"sw": [False] * 4}
    assert "beyond range" in sweep_table(found)
    assert recommend_area(space).span is None


def test_a_long_shift_is_in_the_table_and_not_warned_of(
    tiny_model, word_tokenizer, space, parallel_text, caplog
) -> None:
    options = OPTIONS | {"areas": [(1, 3)], "alpha": [50]}
    found = sweep_area(tiny_model(), word_tokenizer, space, parallel_text, QUESTIONS, **options)
    assert max(found.areas[0].dose["sw"]) > 1
    assert "longer than a hidden state" not in caplog.text
    attach(tiny_model(), space, 1, 3, 50)
    assert "longer than a hidden state" in caplog.text


def test_every_candidate_is_measured_and_the_pivot_is_not(found) -> None:
    areas = [(1, 2), (1, 3), (2, 3)]
    assert [area.candidate for area in found.areas] == [
        (*area, alpha) for area in areas for alpha in (0.5, 1.0)
    ]
    assert found.missing == []
    assert set(found.nll) == set(found.areas[0].nll) == set(found.retrieval) == {"de", "sw", "tr"}
    assert found.seconds > 0
    for area in found.areas:
        half = found.areas[0].dose["sw"][0] / 0.5
        assert area.forward == 2 or area.dose["sw"][0] == pytest.approx(half * area.alpha)


@pytest.mark.parametrize(
    ("blocks", "options", "expected"),
    [
        (4, {}, [(1, 2), (1, 3), (2, 3)]),
        (3, {}, [(1, 2)]),
        (12, {"grid": 5}, [(1, 5), (1, 10), (1, 11), (5, 10), (5, 11)]),
        (12, {"grid": 5, "min_width": 1}, [(1, 5), (1, 10), (1, 11), (5, 10), (5, 11), (10, 11)]),
        (12, {"min_width": 9}, [(1, 10), (1, 11), (2, 11)]),
    ],
)
def test_candidates(blocks: int, options: dict[str, int], expected: list[tuple[int, int]]) -> None:
    assert candidate_areas(blocks, **options) == expected


@pytest.mark.parametrize("blocks", [12, 16, 18, 22, 24, 26, 28, 30, 32, 36, 40, 48, 61, 80])
def test_the_grid_is_about_twenty_inner_areas_of_a_sixth_and_more(blocks: int) -> None:
    areas = candidate_areas(blocks)
    assert 12 <= len(areas) <= 21
    assert all(1 <= f < b <= blocks - 1 and 6 * (b - f) >= blocks for f, b in areas)
    assert min(b - f for f, b in areas) == -(-blocks // 6)  # the narrowest that is allowed is tried


# --- going on ---------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(tiny_model, word_tokenizer, space, parallel_text, tmp_path):
    """Sweeps into ``tmp_path``; keywords overrule."""

    def sweep(**changes: Any) -> AreaSweep:
        data = {"parallel": parallel_text, "space": space, "model": None, **changes}
        model = data.pop("model") or tiny_model()
        return sweep_area(
            model,
            word_tokenizer,
            data.pop("space"),
            data.pop("parallel"),
            **{"output": tmp_path, **OPTIONS, **data},
        )

    return sweep


def test_an_interrupted_sweep_goes_on(swept, space, tmp_path, monkeypatch) -> None:
    whole = swept(output=None)
    passes = []
    real = EffectMeter.perplexity

    def interrupted(self: EffectMeter, handle: Any) -> Any:
        passes.append(handle)
        if len(passes) == 3:  # unshifted, one area, and in the second
            raise KeyboardInterrupt
        return real(self, handle)

    monkeypatch.setattr(EffectMeter, "perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept()
    half = AreaSweep.load(tmp_path)
    assert [area.candidate for area in half.areas] == [(1, 2, 1.0)]
    assert half.missing == [(1, 3, 1.0), (2, 3, 1.0)]
    monkeypatch.setattr(EffectMeter, "perplexity", real)
    rest = swept()
    assert rest.areas == whole.areas == AreaSweep.load(tmp_path).areas
    assert (rest.nll, rest.retrieval) == (whole.nll, whole.retrieval)
    assert rest.shifted_retrieval == whole.shifted_retrieval
    assert rest.seconds > half.seconds
    assert space.sweep is rest


def test_areas_can_be_added_and_nothing_is_measured_twice(swept, monkeypatch, tmp_path) -> None:
    swept(areas=[(1, 2)])
    count = []
    real = EffectMeter.perplexity
    monkeypatch.setattr(
        EffectMeter, "perplexity", lambda self, handle: count.append(handle) or real(self, handle)
    )
    more = swept(areas=[(1, 2), (2, 3)], max_perplexity_rise=0.3)
    assert len(count) == 1
    assert [area.candidate[:2] for area in more.areas] == [(1, 2), (2, 3)]
    swept(areas=[(2, 3)], max_perplexity_rise=0.4)
    assert len(count) == 1
    assert AreaSweep.load(tmp_path).max_perplexity_rise == 0.4


def test_a_sweep_of_something_else_is_refused(swept, tiny_model, space, parallel_text) -> None:
    swept(areas=[(1, 2)])
    changed = {**parallel_text, "sw": [f"{sentence} ?" for sentence in parallel_text["sw"]]}
    in_fp4 = tiny_model()
    in_fp4.config.quantization_config = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    for change, message in (
        ({"model": tiny_model(seed=1), "space": space}, "embedding weights differ|estimated on"),
        ({"space": space.replace_means(space.mean + 0.01)}, "vectors_sha256"),
        ({"parallel": changed}, "parallel_sha256"),
        ({"sentences": 5}, "sentences 6 there, 5 here"),
        ({"languages": ["sw"]}, "parallel_sha256"),
        ({"questions": QUESTIONS}, "questions 0 there, 8 here"),
        ({"model": tiny_model().bfloat16()}, "dtype float32 there, bfloat16 here"),
        ({"model": in_fp4}, "quantization none there, fp4 here"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            swept(areas=[(1, 2)], **change)
        assert "--overwrite" in str(refused.value)
    assert len(swept(areas=[(2, 3)], sentences=5, overwrite=True).areas) == 1


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"areas": [(0, 2)]}, "got 0:2; wanted 1 <= forward < backward <= 3"),
        ({"areas": [(1, 4)]}, "got 1:4"),
        ({"areas": [(2, 2)]}, "got 2:2"),
        ({"areas": []}, "areas: got none"),
        ({"areas": [(1, 2)], "grid": 2}, "grid, min_width"),
        ({"grid": 0}, "grid: got 0"),
        ({"min_width": 3}, "no inner area of that width"),
        ({"alpha": []}, "alpha: got"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"alpha": [1.0, 0.0]}, "none of them 0"),
        ({"max_perplexity_rise": -0.1}, "max_perplexity_rise: got -0.1"),
        ({"sentences": 0}, "sentences: got 0"),
        ({"languages": ["xx"]}, "got 'xx'; wanted one of"),
        ({"languages": ["en"]}, "got only the pivot"),
        ({"parallel": {"en": ["a", "b"], "sw": ["c", "d"]}}, "no row has 'de', 'tr'"),
        (
            {"questions": [question for question in QUESTIONS if question.language == "en"]},
            "in a language that is",
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    swept, tmp_path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        swept(**options)
    assert not (tmp_path / FILE_NAME).exists()


def test_an_attached_model_is_refused(attached, word_tokenizer, own_space, parallel_text) -> None:
    with pytest.raises(ValueError, match="it is attached"):
        sweep_area(attached.model, word_tokenizer, own_space, parallel_text, **OPTIONS)


def test_questions_in_other_languages_are_left_out_aloud(swept, caplog) -> None:
    foreign = [*QUESTIONS, Question(0, "fr", "Ada ?", "Rome")]
    with caplog.at_level(logging.WARNING):
        found = swept(questions=foreign, areas=[(1, 2)], max_questions=2)
    assert "questions in fr are left out" in caplog.text
    assert found.rows == {"en": [0, 2], "sw": [0, 2]}


# --- shown ------------------------------------------------------------------------------------------------------


def test_the_heat_map_shows_the_figures(found, monkeypatch) -> None:
    figures: list[Any] = []
    real = plots.to_bytes
    monkeypatch.setattr(plots, "to_bytes", lambda figure, form: figures.append(figure) or real(figure, form))
    assert plots.sweep_plot(found, alpha=1.0, chosen=(1, 3)).lstrip().startswith(b"<?xml")
    left, right = (axes for axes in figures[0].axes if axes.images)
    shown = left.images[0].get_array()
    assert shown.shape == (2, 2)  # backward 2, 3 by forward 1, 2
    assert bool(shown.mask[0, 1])  # [2, 2) is no area
    areas = {area.candidate: area for area in found.areas}
    for row, column, area in ((0, 0, (1, 2)), (1, 0, (1, 3)), (1, 1, (2, 3))):
        assert shown[row, column] == pytest.approx(found.worst(areas[(*area, 1.0)])[1])
        change = found.accuracy_change(areas[(*area, 1.0)])
        assert right.images[0].get_array()[row, column] == pytest.approx(change.estimate)
    assert [patch.get_xy() for patch in left.patches] == [(-0.5, 0.5)]
    assert plots.sweep_plot(found, alpha=0.5, file_format="png").startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="alpha: got 2"):
        plots.sweep_plot(found, alpha=2.0)


def test_the_table_and_the_report_have_every_area(found, tmp_path) -> None:
    table = sweep_table(found).splitlines()
    assert len(table) == 1 + len(found.areas)
    found.save(tmp_path)
    page = report_folder(tmp_path).read_text(encoding="utf-8")
    assert page.count("<picture>") == 2
    for area in found.areas:
        assert f"[{area.forward}, {area.backward})" in page
        assert f"× {found.perplexity_ratio(area, 'sw'):.3f}" in page


def test_the_file_is_described_by_its_summary(found, tmp_path) -> None:
    summary = json.loads(Path(found.save(tmp_path)).read_text())["summary"]
    assert summary[0]["perplexity"]["sw"] == pytest.approx(found.perplexity("sw", found.areas[0]))
    assert sf.sweep_area is sweep_area


def test_another_intervention_is_swept(tiny_model, word_tokenizer, parallel_text, tmp_path) -> None:
    model, options = tiny_model(), {**OPTIONS, "areas": [(1, 3)], "output": tmp_path}
    space = estimate_space(model, word_tokenizer, parallel_text, rank=4, progress=False)
    mean = sweep_area(model, word_tokenizer, space, parallel_text, **{**options, "output": None})
    swept = sweep_area(model, word_tokenizer, space, parallel_text, intervention="affine", **options)
    area = swept.areas[0]
    assert area.dose["sw"] == pytest.approx(space.shift(1, 3, intervention="affine").dose("sw"))
    assert area.nll["sw"] != mean.areas[0].nll["sw"]
    with pytest.raises(ValueError, match="intervention"):
        sweep_area(model, word_tokenizer, space, parallel_text, **options)
    with pytest.raises(ValueError, match="moves the pivot too"):
        sweep_area(model, word_tokenizer, space, parallel_text, intervention="centre", **options)
