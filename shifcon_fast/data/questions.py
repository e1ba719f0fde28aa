"""Questions whose answers can be checked exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.rows import Row, check_text, is_language, read_rows

Answer = int | float | str


@dataclass(frozen=True)
class Question:
    """One question in one language; questions of the same ``row`` ask the same thing."""

    row: int
    language: str
    text: str
    answer: Answer


def read_questions(
    source: str | Path | Sequence[Question], *, languages: Sequence[str] | None = None
) -> list[Question]:
    """Read questions from JSON Lines or a Hugging Face dataset (``id[:config[:split]]``).

    A row holds the question in several languages, ``{"answer": 18, "en": "...", "sw": "..."}``, and gives one
    :class:`Question` a language; or it holds one, ``{"lang": "sw", "question": "...", "answer": "Nairobi"}``
    (``prompt`` is taken for ``question``). ``answer`` is a number or a string. An integer ``row`` field numbers the
    question; rows without one are numbered from 0 by their place.

    Raises:
        DataError: no answer, no question, empty text, or a language of ``languages`` that the data lacks.
    """
    if isinstance(source, (str, Path)):
        name = str(source)
        questions = [
            question for index, row in enumerate(read_rows(source)) for question in _parse(row, index)
        ]
    else:
        name, questions = "the given questions", list(source)
    if languages is None:
        return questions
    known = list(dict.fromkeys(question.language for question in questions))
    if unknown := [language for language in languages if language not in known]:
        raise DataError(f"{name}: no question in {', '.join(map(repr, unknown))}; found {', '.join(known)}")
    return [question for question in questions if question.language in set(languages)]


def _parse(row: Row, index: int) -> list[Question]:
    answer = row.value.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (int, float, str)) or answer == "":
        raise DataError(f"{row.where}: 'answer' is {answer!r}; wanted a number or a string")
    number = row.value.get("row")
    number = number if isinstance(number, int) else index
    if "lang" in row.value:
        language = check_text(row.value["lang"], row.where, "'lang'")
        key = "question" if row.value.get("question") is not None else "prompt"
        return [Question(number, language, check_text(row.value.get(key), row.where, "'question'"), answer)]
    found = [
        Question(number, key, check_text(value, row.where, f"{key!r}"), answer)
        for key, value in row.value.items()
        if is_language(key, value)
    ]
    if not found:
        raise DataError(
            f"{row.where}: has {', '.join(map(repr, row.value))}; wanted a question under a language code, "
            f"as in {{'answer': 18, 'en': '...'}}, or 'lang', 'question' and 'answer'"
        )
    return found
