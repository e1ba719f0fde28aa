"""The whole evaluation of a tiny model, its file, and the comparison of two results."""

import json
import math
from dataclasses import asdict, replace

import pytest

from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.bootstrap import paired_interval, wilson_interval
from shifcon_fast.evaluation.comparison import PairedComparison, compare
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.evaluation.exact_match import Outcome
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome, measure_multiple_choice
from shifcon_fast.evaluation.perplexity import measure_perplexity
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.storage import write_json

QUESTIONS = [
    Question(0, "en", "Ada lives in ?", "Rome"),
    Question(0, "sw", "Ada anaishi ?", "Roma"),
    Question(1, "en", "Ben has ?", 3),
]


@pytest.fixture(scope="module")
def plain(tiny_model, word_tokenizer, parallel_text) -> EvaluationResult:
    return evaluate(tiny_model(), word_tokenizer, parallel_text, QUESTIONS, max_new_tokens=4, progress=False)


def test_a_plain_model_is_measured_unshifted(plain, tiny_model, word_tokenizer, parallel_text) -> None:
    assert plain.area is None
    assert plain.pivot == "en"
    assert list(plain.retrieval) == list(plain.perplexity) == ["unshifted"]
    assert plain.retrieval["unshifted"].boundaries == [0, 1, 2, 3]
    assert plain.retrieval["unshifted"].matrix_boundary == 2
    wanted = measure_perplexity(tiny_model(), word_tokenizer, parallel_text["tr"], language="tr")
    assert plain.perplexity["unshifted"]["tr"] == wanted
    assert [(o.row, o.language) for o in plain.outcomes] == [(0, "en"), (0, "sw"), (1, "en")]
    assert plain.settings["max_new_tokens"] == 4


@pytest.mark.filterwarnings("error:.*unshifted")  # it is meant here
def test_an_attached_model_is_measured_both_ways(attached, plain, word_tokenizer, parallel_text) -> None:
    attached.model.train()
    found = evaluate(
        attached.model,
        word_tokenizer,
        parallel_text,
        QUESTIONS,
        languages=["sw"],
        boundaries=[2],
        max_new_tokens=4,
        progress=False,
    )
    assert attached.model.training  # as it was before
    area = {"forward": 1, "backward": 3, "alpha": 1.0, "recipe": "stable", "intervention": "mean"}
    assert found.area == area
    assert list(found.retrieval) == ["unshifted", "shifted"]
    assert found.retrieval["shifted"].languages == ["en", "sw"]
    assert found.retrieval["shifted"].matrix_boundary == 1
    before, after = found.retrieval["unshifted"].scores["sw"], found.retrieval["shifted"].scores["sw"]
    reference = plain.retrieval["unshifted"].scores["sw"]
    assert before.mexa == [reference.mexa[2]]
    assert after.to_pivot != before.to_pivot or after.mexa != before.mexa
    plain_sw, shifted_sw = (found.perplexity[mode]["sw"].value for mode in ("unshifted", "shifted"))
    assert plain_sw == pytest.approx(plain.perplexity["unshifted"]["sw"].value, rel=1e-5)
    assert abs(math.log(shifted_sw / plain_sw)) > 1e-3
    assert [o.language for o in found.outcomes] == ["sw"]


def test_a_result_survives_its_file(plain, tmp_path) -> None:
    path = plain.save(tmp_path / "new")
    assert path == tmp_path / "new" / "evaluation.json"
    assert EvaluationResult.load(path) == plain
    assert EvaluationResult.load(tmp_path / "new") == plain
    text = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert text["summary"]["perplexity"]["unshifted"]["de"] == plain.perplexity["unshifted"]["de"].value
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"evaluation\.json: kind is None; wanted 'evaluation'"):
        EvaluationResult.load(path)
    path.write_text('{"kind": "evaluation", "format_version": 1}')
    with pytest.raises(ValueError, match=r"evaluation\.json: lacks 'model'"):
        EvaluationResult.load(path)
    with pytest.raises(ValueError, match="no such file"):
        EvaluationResult.load(tmp_path / "nowhere.json")


def result(name: str, right: dict[str, list[int]], in_language: bool | None = None) -> EvaluationResult:
    outcomes = [
        Outcome(row, code, "?", "!", "42", "42", bool(correct), in_language)
        for code, values in right.items()
        for row, correct in enumerate(values)
    ]
    return EvaluationResult(model=name, pivot="en", area=None, outcomes=outcomes)


def test_accuracy_by_language() -> None:
    found = result("a", {"en": [1, 1, 1, 0], "sw": [0, 0]}, in_language=True)
    assert found.accuracy() == {"en": wilson_interval([1, 1, 1, 0]), "sw": wilson_interval([0, 0])}
    assert found.answer_language()["sw"] == wilson_interval([1, 1])
    assert result("a", {"en": [1]}).answer_language() == {"en": None}


def test_two_results_are_paired_by_row_and_language() -> None:
    first, second = [1, 1, 0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0, 1]
    ours = result("ours", {"sw": first, "en": [1, 1, 1]})
    theirs = result("theirs", {"de": [0], "sw": second})
    shuffled = replace(theirs, outcomes=theirs.outcomes[::-1])
    found = compare(ours, shuffled, resamples=500)
    assert (found.model, found.against) == ("ours", "theirs")
    assert found.accuracy == {"sw": paired_interval(first, second, resamples=500)}
    assert found.log_perplexity == {}


def test_perplexities_are_compared_as_each_model_is_used(
    plain, attached, word_tokenizer, parallel_text
) -> None:
    shifted = evaluate(attached.model, word_tokenizer, parallel_text, progress=False, boundaries=[1])
    found = compare(shifted, plain, resamples=300).log_perplexity
    ratio = shifted.perplexity["shifted"]["sw"].value / plain.perplexity["unshifted"]["sw"].value
    assert found["sw"].estimate == pytest.approx(math.log(ratio))
    assert found["sw"].low < found["sw"].estimate < found["sw"].high
    assert found["en"].estimate == pytest.approx(0, abs=1e-6)


CHOICES = [
    Question(0, "en", "Ada lives in", "Rome", ("Rome", "bread"), "place"),
    Question(0, "sw", "Ada anaishi", "Roma", ("Roma", "mkate"), "place"),
    Question(1, "sw", "Ben ana", "paka", ("samaki", "paka"), "animal"),
]


def test_choices_are_scored_and_the_rest_is_generated(attached, word_tokenizer, tmp_path) -> None:
    asked = [*CHOICES, Question(2, "en", "Ben has ?", 3)]
    found = evaluate(attached.model, word_tokenizer, None, asked, max_new_tokens=4, progress=False)
    assert [(o.row, o.language) for o in found.outcomes] == [(2, "en")]
    assert list(found.multiple_choice) == ["unshifted", "shifted"]
    assert found.multiple_choice["unshifted"] == measure_multiple_choice(
        attached.model, word_tokenizer, CHOICES
    )
    assert found.multiple_choice["shifted"] == measure_multiple_choice(
        attached.model, word_tokenizer, CHOICES, handle=attached
    )
    assert EvaluationResult.load(found.save(tmp_path)) == found
    summary = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["summary"]
    right = [o.correct for o in found.multiple_choice["shifted"] if o.language == "sw"]
    assert summary["multiple_choice"]["shifted"]["acc"]["sw"] == asdict(wilson_interval(right))
    with pytest.raises(ValueError, match="multiple_choice: wanted the same questions in both modes"):
        replace(found, multiple_choice={**found.multiple_choice, "shifted": []})
    with pytest.raises(ValueError, match="has no chat template"):
        evaluate(attached.model, word_tokenizer, None, CHOICES, choice_chat_template=True, progress=False)


def chosen(name: str, right: dict[str, list[int]], area=None) -> EvaluationResult:
    """Right and wrong choices; the longer one is the right one, so that per character the other is chosen."""
    outcomes = [
        ChoiceOutcome(row, code, "", "?", ["a", "bbbbb"], 1, [-2.0, -1.0 if correct else -3.0])
        for code, values in right.items()
        for row, correct in enumerate(values)
    ]
    return EvaluationResult(model=name, pivot="en", area=area, multiple_choice={"unshifted": outcomes})


def test_choices_are_paired_by_row_and_language() -> None:
    first, second = [1, 1, 0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0, 1]
    found = compare(chosen("a", {"sw": first, "en": [1]}), chosen("b", {"sw": second}), resamples=500)
    assert found.choice_accuracy == {"sw": paired_interval(first, second, resamples=500)}
    assert found.choice_accuracy_norm == {"sw": paired_interval([1] * 8, [1] * 8, resamples=500)}
    assert found.accuracy == {}
    with pytest.raises(ValueError, match="different multiple-choice questions in 'sw'"):
        compare(chosen("a", {"sw": [1]}), chosen("b", {"sw": [1, 0]}))


def test_a_comparison_of_choices_survives_its_file(tmp_path) -> None:
    found = compare(chosen("a", {"sw": [1, 0, 1]}), chosen("b", {"sw": [0, 0, 1]}), resamples=100)
    write_json(tmp_path / "comparison.json", found.to_json())
    assert PairedComparison.load(tmp_path / "comparison.json") == found


def test_bad_input_is_named(attached, plain, tiny_model, word_tokenizer, parallel_text) -> None:
    with pytest.raises(ValueError, match="parallel and questions are both None"):
        evaluate(tiny_model(), word_tokenizer)
    with pytest.raises(ValueError, match="boundaries: got 4; the model has 0 … 3"):
        evaluate(tiny_model(), word_tokenizer, parallel_text, boundaries=[4], progress=False)
    with pytest.raises(ValueError, match="fr"):
        texts = {"en": ["Rome", "Ada"], "fr": ["Rome", "Ada"]}
        evaluate(attached.model, word_tokenizer, texts, progress=False)
    with pytest.raises(ValueError, match="different questions in 'en'"):
        compare(result("a", {"en": [1]}), result("b", {"en": [1, 0]}))
    with pytest.raises(ValueError, match="no question and no sentence in common"):
        compare(result("a", {"en": [1]}), result("b", {"de": [1]}))


def test_one_language_is_one_line_however_it_is_written(attached, word_tokenizer, parallel_text) -> None:
    """The space says sw, the sentences swh_Latn, the questions swh."""
    rows = [
        {"eng_Latn": english, "swh_Latn": swahili}
        for english, swahili in zip(parallel_text["en"][:4], parallel_text["sw"][:4], strict=True)
    ]
    asked = [{"lang": "swh", "question": "Ada anaishi ?", "answer": "Roma"}, {"answer": 3, "en": "Ben has ?"}]
    found = evaluate(
        attached.model, word_tokenizer, rows, asked, boundaries=[2], max_new_tokens=2, progress=False
    )
    assert found.pivot == "eng_Latn"
    assert list(found.perplexity["shifted"]) == ["eng_Latn", "swh_Latn"]
    assert [outcome.language for outcome in found.outcomes] == ["swh_Latn", "eng_Latn"]
    named = {"en": parallel_text["en"][:4], "sw": parallel_text["sw"][:4]}
    same = evaluate(attached.model, word_tokenizer, named, boundaries=[2], progress=False)
    assert found.perplexity["shifted"]["swh_Latn"] == same.perplexity["shifted"]["sw"]
    with pytest.raises(ValueError, match="got 'pt-PT'; wanted one of en, de, sw, tr"):
        evaluate(attached.model, word_tokenizer, questions=[Question(0, "pt-PT", "Ada", 1)])


def test_results_are_compared_however_the_languages_are_written(plain) -> None:
    flores = {"en": "eng_Latn", "de": "deu_Latn", "sw": "swh_Latn", "tr": "tur_Latn"}
    other = replace(
        plain,
        perplexity={
            "unshifted": {flores[code]: each for code, each in plain.perplexity["unshifted"].items()}
        },
        outcomes=[replace(each, language=flores[each.language]) for each in plain.outcomes],
    )
    assert compare(plain, other).accuracy.keys() == {"en", "sw"}
    assert list(compare(other, plain).log_perplexity) == list(flores.values())
