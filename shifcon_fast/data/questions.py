"""Questions whose answers can be checked exactly: free answers, and multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shifcon_fast.data.answers import Answer
from shifcon_fast.data.choices import answer_and_choices, check_choices
from shifcon_fast.data.columns import language_fields
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.languages import find_language, refuse_repeated
from shifcon_fast.data.row import Row, check_text, is_missing
from shifcon_fast.data.rows import Source, read_rows, source_name

_DROP = ", or allow_missing (--allow-missing) to leave the question out"
_OTHER_FIELDS = ("row", "answer", "lang", "question", "prompt", "choices", "group")


@dataclass(frozen=True)
class Question:
    """One question in one language; questions of the same ``row`` ask the same thing.

    Attributes:
        choices: the texts to choose from, the answer one of them; empty where the answer is to be generated.
        group: the kind of question, such as ``"currency"``; empty where the data names none.
    """

    row: int
    language: str
    text: str
    answer: Answer
    choices: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        if self.choices:
            check_choices(self.choices, f"choices of question {self.row} ({self.language})")
            if self.answer not in self.choices:
                raise DataError(
                    f"question {self.row} ({self.language}): answer is {self.answer!r}, which is none of the "
                    f"choices {', '.join(map(repr, self.choices))}"
                )

    @property
    def gold(self) -> int:
        """The place of the right choice, from 0.

        Raises:
            ValueError: the question has no choices.
        """
        if not self.choices:
            raise ValueError(f"question {self.row} ({self.language}) has no choices; wanted multiple choice")
        return self.choices.index(str(self.answer))


def read_questions(
    source: Source | Sequence[Question],
    *,
    languages: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> list[Question]:
    """Read questions from whatever :func:`~shifcon_fast.data.rows.read_rows` reads, or take ready ones.

    A row holds the question in several languages, ``{"answer": 18, "en": "...", "sw": "..."}``, and gives one
    :class:`Question` a language; or it holds one, ``{"lang": "sw", "question": "...", "answer": "Nairobi"}``
    (``prompt`` is taken for ``question``). ``answer`` is a number, a string or a list of accepted ones. An integer
    ``row`` field numbers the question; rows without one are numbered from 0 by their place. ``choices`` makes it
    multiple choice, see :func:`~shifcon_fast.data.choices.answer_and_choices`; ``group`` names the kind.

    Args:
        source: a file, a Hugging Face dataset (``id[:config[:split]]``), rows in memory, or ready questions.
        languages: which to keep, and the names they have in the result; codes may be written otherwise than in the
            data. Fields of any name can be listed. None reads what
            :func:`~shifcon_fast.data.columns.language_fields` takes for a language.
        allow_missing: leave out a question that is missing in a language (nothing visible), instead of refusing it.

    Raises:
        DataError: no answer, no question, empty text, wrong choices, or a language of ``languages`` that the data
            lacks.
    """
    if isinstance(source, Sequence) and source and all(isinstance(item, Question) for item in source):
        name, questions = "the given questions", list(source)
    else:
        name, rows = source_name(source), read_rows(source)  # type: ignore[arg-type]
        fields = _fields(rows, name, languages)
        questions = [
            question
            for index, row in enumerate(rows)
            for question in _parse(
                row, index, fields, allow_missing=allow_missing, some_only=languages is not None
            )
        ]
    known = list(dict.fromkeys(question.language for question in questions))
    if languages is None:
        refuse_repeated(known, name)
        return questions
    refuse_repeated(languages, "languages")
    found = {language: find_language(language, known) for language in languages}
    if unknown := [language for language, name_there in found.items() if name_there is None]:
        raise DataError(f"{name}: no question in {', '.join(map(repr, unknown))}; found {', '.join(known)}")
    shown = {name_there: language for language, name_there in found.items()}
    return [
        replace(question, language=shown[question.language])
        for question in questions
        if question.language in shown
    ]


def _fields(rows: Sequence[Row], name: str, languages: Sequence[str] | None) -> list[str]:
    """The fields that hold the question in a language, of the rows that do not name one in ``lang``."""
    several = [row for row in rows if "lang" not in row.value]
    if not several:
        return []
    if languages is None:
        return language_fields(several, name, known=_OTHER_FIELDS)
    present = list(dict.fromkeys(key for row in several for key in row.value if key not in _OTHER_FIELDS))
    found = [find_language(language, present) for language in languages]
    listed = [field for field in found if field is not None]
    return listed if len(listed) == len(found) else language_fields(several, name, known=_OTHER_FIELDS)


def _parse(
    row: Row, index: int, fields: Sequence[str], *, allow_missing: bool, some_only: bool
) -> list[Question]:
    """The questions of a row in ``fields``; with ``some_only`` there may be none, since it has other languages."""
    number = _row_number(row.value.get("row"), index)
    group = row.value.get("group") or ""
    if not isinstance(group, str):
        raise DataError(f"{row.where}: 'group' is {group!r}; wanted the name of a kind of question")
    if "lang" in row.value:
        language = check_text(row.value["lang"], row.where, "'lang'")
        key = "question" if row.value.get("question") is not None else "prompt"
        text = check_text(row.value.get(key), row.where, "'question'")
        return [Question(number, language, text, *answer_and_choices(row, language), group)]
    values = {key: row.value[key] for key in fields if row.value.get(key) is not None}
    if allow_missing:
        values = {key: value for key, value in values.items() if not is_missing(value)}
    elif not values and not some_only:
        raise DataError(
            f"{row.where}: has {', '.join(map(repr, row.value))}; wanted a question under a language code, "
            f"as in {{'answer': 18, 'en': '...'}}, or 'lang', 'question' and 'answer'"
        )
    return [
        Question(
            number,
            key,
            check_text(value, row.where, f"{key!r}", if_empty=_DROP),
            *answer_and_choices(row, key),
            group,
        )
        for key, value in values.items()
    ]


def _row_number(value: object, index: int) -> int:
    """A row's own number, also as the text of a CSV field; else its place."""
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else index
