"""Questions: one per language, answers as they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.questions import Question, read_questions


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_one_question_per_language(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"row": 7, "answer": 18, "en": "How many?", "id": "Berapa?"},
        {"answer": 1.5, "en": "x"},
    )
    assert read_questions(path) == [
        Question(7, "en", "How many?", 18),
        Question(7, "id", "Berapa?", 18),
        Question(1, "en", "x", 1.5),
    ]
    assert read_questions(path, languages=["id"]) == [Question(7, "id", "Berapa?", 18)]
    with pytest.raises(DataError, match="no question in 'sw'; found en, id"):
        read_questions(path, languages=["sw"])


def test_several_accepted_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"en": "How many?", "answer": [18, "eighteen"]})
    assert read_questions(path) == [Question(0, "en", "How many?", (18, "eighteen"))]


def test_rows_of_one_language(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"lang": "sw", "question": "Wapi?", "answer": "Nairobi"},
        {"lang": "en", "prompt": "Where?", "answer": "Nairobi"},
    )
    assert read_questions(path) == [
        Question(0, "sw", "Wapi?", "Nairobi"),
        Question(1, "en", "Where?", "Nairobi"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"en": "x"}, r"q\.jsonl:1: 'answer' is None"),
        ({"en": "x", "answer": None}, r"q\.jsonl:1: 'answer' is None"),
        ({"en": "x", "answer": True}, "'answer' is True"),
        (
            {"en": "x", "answer": float("nan")},
            r"q\.jsonl:1: 'answer' is NaN \(not a number\), which pandas writes",
        ),
        ({"en": "x", "answer": float("inf")}, r"q\.jsonl:1: 'answer' is infinite; wanted a finite number"),
        ({"en": "x", "answer": [1, float("-inf")]}, r"q\.jsonl:1: 'answer' is infinite"),
        ({"en": "x", "answer": []}, r"'answer' is \[\]; wanted a list of accepted answers"),
        ({"en": "x", "answer": [[1]]}, "wanted a list of accepted answers, each a number or a string"),
        ({"en": "x", "answer": {"en": {"value": 1}}}, "wanted a number or a string"),
        ({"en": "x", "answer": " "}, "' ', which is empty"),
        ({"en": "x", "answer": "\u200b"}, "which is empty"),
        ({"answer": 1, "row": 2}, "wanted a question under a language code"),
        ({"answer": 1, "en": ""}, "'en' is empty"),
        ({"answer": 1, "lang": "en"}, "'question' is null"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", row))


def test_choices_for_all_languages_or_for_each(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"row": 3, "group": "city", "answer": 1, "choices": ["Rom", "Bonn"], "en": "Where?", "de": "Wo?"},
        {"answer": 0, "choices": {"en": ["Rome", "Bonn"], "de": ["Rom", "Bonn"]}, "en": "a?", "de": "b?"},
        {"answer": "2", "choices": ["1", "2"], "en": "1 + 1?"},
        {"answer": {"sw": "Roma"}, "choices": {"sw": ["Bonn", "Roma"]}, "lang": "sw", "question": "Wapi?"},
    )
    found = read_questions(path)
    assert found[0] == Question(3, "en", "Where?", "Bonn", ("Rom", "Bonn"), "city")
    assert [(q.language, q.answer, q.gold) for q in found] == [
        ("en", "Bonn", 1),
        ("de", "Bonn", 1),
        ("en", "Rome", 0),
        ("de", "Rom", 0),
        ("en", "2", 1),  # a string is a text, not a place
        ("sw", "Roma", 1),
    ]
    with pytest.raises(ValueError, match=r"question 0 \(en\) has no choices"):
        _ = Question(0, "en", "x", 1).gold
    with pytest.raises(DataError, match="answer is 'c', which is none of the choices 'a', 'b'"):
        Question(0, "en", "x", "c", ("a", "b"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"answer": 2, "choices": ["a", "b"]},
            "'answer' is 2; wanted the text of a choice or its place, 0 … 1",
        ),
        ({"answer": -1, "choices": ["a", "b"]}, "'answer' is -1"),
        ({"answer": 1.0, "choices": ["a", "b"]}, "'answer' is 1.0"),
        ({"answer": "B", "choices": ["a", "b"]}, "'B', which is none of the choices in 'en'"),
        ({"answer": 0, "choices": ["a", "a"]}, "holds 'a' twice"),
        ({"answer": 0, "choices": ["a"]}, "holds 1; wanted at least two"),
        ({"answer": 0, "choices": []}, "holds 0; wanted at least two"),
        ({"answer": 0, "choices": ["a", ""]}, r"'choices'\[1\] is empty"),
        ({"answer": 0, "choices": [1, 2]}, r"'choices'\[0\] is int"),
        ({"answer": 0, "choices": "ab"}, "'choices' in 'en' is str; wanted a list"),
        ({"answer": 0, "choices": {"de": ["a", "b"]}}, "'choices' has 'de'; wanted 'en' as well"),
        ({"answer": {"de": 0}, "choices": ["a", "b"]}, "'answer' has 'de'; wanted 'en' as well"),
        ({"answer": 0, "choices": ["a", "b"], "group": 3}, "'group' is 3"),
    ],
)
def test_bad_choices(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", {"en": "x", **fields}))


def test_real_questions(shifcon_data: Path) -> None:
    questions = read_questions(shifcon_data / "mgsm.jsonl")
    assert len(questions) == 200 * 11
    assert questions[0].answer == 18
