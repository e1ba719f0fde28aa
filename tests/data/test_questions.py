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
        ({"en": "x", "answer": True}, "'answer' is True"),
        ({"answer": 1, "row": 2}, "wanted a question under a language code"),
        ({"answer": 1, "en": ""}, "'en' is empty"),
        ({"answer": 1, "lang": "en"}, "'question' is null"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", row))


def test_real_questions(shifcon_data: Path) -> None:
    questions = read_questions(shifcon_data / "mgsm.jsonl")
    assert len(questions) == 200 * 11
    assert questions[0].answer == 18
