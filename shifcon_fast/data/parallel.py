"""Parallel sentences: the same sentence in several languages, aligned by position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.rows import Row, check_text, is_language, read_rows


def read_parallel(
    source: str | Path | Mapping[str, Sequence[str]],
    *,
    languages: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> dict[str, list[str]]:
    """Read sentences aligned by position: ``result["sw"][i]`` translates ``result["en"][i]``.

    Args:
        source: a JSON Lines file with one ``{"en": "...", "sw": "...", ...}`` a line; a Hugging Face dataset
            (``id``, ``id:config`` or ``id:config:split``) or dataset folder with such columns, or with the
            ``translation`` column of ``datasets.features.Translation``; or a mapping of language to sentences.
        languages: which languages to read, in this order; None reads every field whose name is two or three
            lower-case letters and whose value is a string. Names of another form (``zh-Hans``) must be listed here.
        allow_missing: drop the rows in which one of the languages is missing, instead of refusing them.

    Returns:
        At least two sentences for each language, all lists equally long.

    Raises:
        DataError: malformed rows, a language missing (in some rows or altogether), an empty sentence, fewer than
            two sentences. The message names the file and the line.
    """
    if isinstance(source, Mapping):
        name, rows = "the given mapping", _rows_of_mapping(source)
        known = list(source)
    else:
        name = str(source)
        rows = [Row(row.where, _sentences(row.value)) for row in read_rows(source)]
        known = list(
            dict.fromkeys(key for row in rows for key, value in row.value.items() if is_language(key, value))
        )
    wanted = _wanted_languages(name, rows, known, languages)

    complete, missing = [], Counter[str]()
    first = ""
    for row in rows:
        absent = [language for language in wanted if row.value.get(language) is None]
        for language in wanted:
            if language not in absent:
                check_text(row.value[language], row.where, f"{language!r}")
        if absent:
            missing.update(absent)
            first = first or f"{row.where} lacks {', '.join(map(repr, absent))}"
        else:
            complete.append(row.value)
    if missing and not allow_missing:
        counts = ", ".join(
            f"{language!r} in {count} of {len(rows)} rows" for language, count in missing.items()
        )
        raise DataError(
            f"{name}: a language is missing: {counts} (first: {first}). Wanted every language in every row; "
            f"allow_missing (--allow-missing) drops these rows, `languages` leaves languages out"
        )
    if len(complete) < 2:
        raise DataError(
            f"{name}: {len(complete)} complete row(s) for {', '.join(wanted)}; wanted at least two sentences"
        )
    return {language: [row[language] for row in complete] for language in wanted}


def _sentences(row: dict[str, Any]) -> dict[str, Any]:
    translation = row.get("translation")
    return dict(translation) if isinstance(translation, Mapping) else row


def _rows_of_mapping(source: Mapping[str, Sequence[str]]) -> list[Row]:
    if not source:
        raise DataError("the given mapping holds no language; wanted {language: [sentence, ...]}")
    for language, sentences in source.items():
        if not isinstance(language, str) or isinstance(sentences, str) or not isinstance(sentences, Sequence):
            raise DataError(
                f"the given mapping has {language!r}: {type(sentences).__name__}; wanted a language code and a list"
            )
    lengths = {language: len(sentences) for language, sentences in source.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"the given mapping has lists of unequal length, {lengths}; wanted them aligned by position"
        )
    return [
        Row(f"sentence {index} (from 0) of the given mapping", dict(zip(source, sentences, strict=True)))
        for index, sentences in enumerate(zip(*source.values(), strict=True))
    ]


def _wanted_languages(
    name: str, rows: list[Row], known: list[str], languages: Sequence[str] | None
) -> list[str]:
    if languages is None:
        if not known:
            keys = ", ".join(repr(key) for key in rows[0].value) if rows else "nothing"
            raise DataError(
                f"{name}: no language found (the first row has {keys}); wanted keys of two or three lower-case "
                f"letters with strings, as in {{'en': '...', 'sw': '...'}}"
            )
        return known
    if isinstance(languages, str) or not languages:
        raise DataError(f"languages: got {languages!r}; wanted a list of language codes")
    wanted = list(dict.fromkeys(languages))
    present = {key for row in rows for key, value in row.value.items() if value is not None}
    if unknown := [language for language in wanted if language not in present]:
        raise DataError(
            f"{name}: no row has {', '.join(map(repr, unknown))}; found {', '.join(known) or 'none'}"
        )
    return wanted
