"""Parallel sentences: the same sentence in several languages, aligned by position."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shifcon_fast.data.columns import language_fields
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.languages import find_language, is_code, nearest, refuse_repeated
from shifcon_fast.data.row import Row, check_text, is_missing
from shifcon_fast.data.rows import Source, read_rows, source_name

logger = logging.getLogger(__name__)

_DROP = ", or allow_missing (--allow-missing) to drop the row"

Parallel = Source | Mapping[str, Iterable[str]]
"""Aligned sentences: rows with a field a language, in any source, or ``{language: [sentence, ...]}``."""


class ParallelText(dict[str, list[str]]):
    """Language → its sentences, aligned by position, as :func:`read_parallel` read and checked them.

    Reading it again checks no sentence a second time: each caller may read what it is given, and the first pays.
    """


def read_parallel(
    source: Parallel,
    *,
    languages: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> ParallelText:
    """Read sentences aligned by position: ``result["sw"][i]`` translates ``result["en"][i]``.

    Args:
        source: rows ``{"en": "...", "sw": "...", ...}``, or with such a value in the ``translation`` column of
            ``datasets.features.Translation``, in whatever :func:`~shifcon_fast.data.rows.read_rows` reads: a file,
            a Hugging Face dataset (``id``, ``id:config`` or ``id:config:split``), a ``datasets.Dataset``, a list of
            dicts; or a mapping of language to sentences.
        languages: which languages to read, in this order, and the names they have in the result; codes may be
            written otherwise than in the data (``sw`` finds ``swh_Latn``), and names of any form can be listed.
            None reads what :func:`~shifcon_fast.data.columns.language_fields` takes for a language, and logs which.
        allow_missing: drop the rows in which one of the languages is missing (null, NaN, or nothing visible),
            instead of refusing them.

    Returns:
        At least two sentences for each language, all lists equally long.

    Raises:
        DataError: malformed rows, a language missing (in some rows or altogether), an empty sentence, fewer than
            two sentences, two fields for one language. The message names the file and the line.
    """
    if isinstance(source, ParallelText) and (found := _already_read(source, languages)) is not None:
        return found
    if isinstance(source, Mapping) and not _is_splits(source):
        name, rows = "the given mapping", _rows_of_mapping(source)
        refuse_repeated(list(source), name)
        known = list(source)
    else:
        read = read_rows(source)  # type: ignore[arg-type]
        name = source_name(source)
        declared = any(isinstance(row.value.get("translation"), Mapping) for row in read)
        rows = [Row(row.where, _sentences(row.value)) for row in read]
        known = language_fields(rows, name, declared=declared) if languages is None else []
    fields = _wanted_fields(name, rows, known, languages)

    complete, missing = [], Counter[str]()
    first = ""
    for row in rows:
        absent = [each for each in fields.values() if _is_absent(row.value.get(each), allow_missing)]
        for each in fields.values():
            if each not in absent:
                check_text(row.value[each], row.where, f"{each!r}", if_empty=_DROP)
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
            "allow_missing (--allow-missing) drops these rows, `languages` (--languages) leaves languages out"
        )
    if len(complete) < 2:
        raise DataError(
            f"{name}: {len(complete)} complete row(s) for {', '.join(fields)}; wanted at least two sentences"
        )
    return ParallelText({language: [row[each] for row in complete] for language, each in fields.items()})


def _already_read(text: ParallelText, languages: Sequence[str] | None) -> ParallelText | None:
    """The languages of what was read before; None where it no longer holds, or does not have them all."""
    if len({len(sentences) for sentences in text.values()}) != 1 or len(next(iter(text.values()))) < 2:
        return None
    if languages is None:
        return text
    if isinstance(languages, str) or len(set(languages)) < max(1, len(languages)):
        return None
    found = {language: find_language(language, text) for language in languages}
    if len(set(found.values()) - {None}) < len(found):
        return None
    return ParallelText({language: text[each] for language, each in found.items() if each is not None})


def find_pivot(pivot: str, sentences: Mapping[str, Any], source: str) -> str:
    """The pivot as the data writes it.

    Args:
        source: what the data is called, for the error.

    Raises:
        ValueError: the data does not have it.
    """
    found = find_language(pivot, sentences)
    if found is None:
        raise ValueError(
            f"pivot: got {pivot!r}; {source} has {', '.join(sentences)}; choose one of them with --pivot"
        )
    return found


def _is_absent(value: object, allow_missing: bool) -> bool:
    """Whether a row lacks a sentence. A string with nothing visible counts only if rows may be dropped."""
    return is_missing(value) and (allow_missing or not isinstance(value, str))


def _is_splits(source: Mapping[str, Any]) -> bool:
    """Whether a mapping is a ``DatasetDict`` of splits, which the reader of rows refuses with advice."""
    return any(hasattr(value, "column_names") for value in source.values())


def _sentences(row: dict[str, Any]) -> dict[str, Any]:
    translation = row.get("translation")
    return dict(translation) if isinstance(translation, Mapping) else row


def _shown(key: str, value: object) -> str:
    return f"{key!r} with a {type(value).__name__}" if isinstance(value, (list, Mapping)) else repr(key)


def _rows_of_mapping(source: Mapping[str, Iterable[str]]) -> list[Row]:
    if not source:
        raise DataError("the given mapping holds no language; wanted {language: [sentence, ...]}")
    lists = {}
    for language, sentences in source.items():
        if not isinstance(language, str) or isinstance(sentences, str) or not isinstance(sentences, Iterable):
            raise DataError(
                f"the given mapping has {language!r}: {type(sentences).__name__}; wanted a language code and a list"
            )
        lists[language] = list(sentences)
    lengths = {language: len(sentences) for language, sentences in lists.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"the given mapping has lists of unequal length, {lengths}; wanted them aligned by position"
        )
    return [
        Row(f"sentence {index} (from 0) of the given mapping", dict(zip(lists, sentences, strict=True)))
        for index, sentences in enumerate(zip(*lists.values(), strict=True))
    ]


def _wanted_fields(
    name: str, rows: list[Row], known: list[str], languages: Sequence[str] | None
) -> dict[str, str]:
    """Language, as the result names it → field of the data."""
    if languages is None:
        if not known:
            keys = (
                ", ".join(_shown(key, value) for key, value in rows[0].value.items()) if rows else "nothing"
            )
            raise DataError(
                f"{name}: no language found (the first row has {keys}); wanted fields named by language codes, "
                "with strings, as in {'en': '...', 'sw': '...'}; fields of other names are read if `languages` "
                "(--languages) lists them"
            )
        return {language: language for language in known}
    if isinstance(languages, str) or not languages:
        raise DataError(f"languages: got {languages!r}; wanted a list of language codes")
    wanted = list(dict.fromkeys(languages))
    refuse_repeated(wanted, "languages")
    present = list(
        dict.fromkeys(key for row in rows for key, value in row.value.items() if isinstance(value, str))
    )
    found = {language: find_language(language, present) for language in wanted}
    if unknown := [language for language, field in found.items() if field is None]:
        near = [each for language in unknown for each in nearest(language, present)]
        advice = f"; if {near[0]!r} is meant, write that" if near else ""
        shown = known or language_fields(rows, name)
        raise DataError(
            f"{name}: no row has {', '.join(map(repr, unknown))}; found {', '.join(shown) or 'none'}{advice}; "
            "wanted all that `languages` (--languages) asks for, or the language space that is trained with"
        )
    if unread := [each for each in present if is_code(each) and each not in found.values()]:
        logger.info("%s: %s not read; languages %s", name, ", ".join(unread), ", ".join(wanted))
    return {language: field for language, field in found.items() if field is not None}
