"""The choices of a multiple-choice question, and which of them is right, out of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shifcon_fast.data.answers import Answer, check_answer
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.languages import find_language
from shifcon_fast.data.row import Row, check_text


def answer_and_choices(row: Row, language: str) -> tuple[Answer, tuple[str, ...]]:
    """The answer, and the texts it is one of; no texts where the row has no ``choices``.

    ``choices`` is a list of texts, or one for each language, ``{"en": [...], "sw": [...]}``. The answer then is a
    place in the list, counted from 0 (an integer), or the text of the right choice (a string); it too may be given
    for each language.

    Raises:
        DataError: no answer, choices that are not at least two distinct texts, or an answer that is none of them.
    """
    answer = check_answer(_of_language(row, "answer", language), row.where)
    choices = _of_language(row, "choices", language)
    if choices is None:
        return answer, ()
    what = f"{row.where}: 'choices' in {language!r}"
    if not isinstance(choices, (list, tuple)):
        raise DataError(f"{what} is {type(choices).__name__}; wanted a list of texts")
    texts = tuple(check_text(text, row.where, f"'choices'[{place}]") for place, text in enumerate(choices))
    check_choices(texts, what)
    if isinstance(answer, str):
        if answer not in texts:
            raise DataError(
                f"{row.where}: 'answer' is {answer!r}, which is none of the choices in {language!r} "
                f"({', '.join(map(repr, texts))}); wanted the text of one, or its place counted from 0"
            )
        return answer, texts
    if not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise DataError(
            f"{row.where}: 'answer' is {answer!r}; wanted the text of a choice or its place, 0 … {len(texts) - 1}"
        )
    return texts[answer], texts


def check_choices(choices: Sequence[str], what: str) -> None:
    """Raise DataError unless there are at least two texts and all are different."""
    if len(choices) < 2:
        raise DataError(f"{what} holds {len(choices)}; wanted at least two")
    if len(set(choices)) < len(choices):
        twice = next(text for place, text in enumerate(choices) if text in choices[:place])
        raise DataError(f"{what} holds {twice!r} twice; wanted different texts, of which one is right")


def _of_language(row: Row, key: str, language: str) -> Any:
    """A field that is the same for all languages, or the language's part of it."""
    value = row.value.get(key)
    if not isinstance(value, Mapping):
        return value
    found = find_language(language, value)
    if found is None:
        raise DataError(
            f"{row.where}: {key!r} has {', '.join(map(repr, value)) or 'nothing'}; wanted {language!r} as well"
        )
    return value[found]
