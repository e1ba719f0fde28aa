"""Which fields of the rows hold a language, where nobody has said so."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from shifcon_fast.data.languages import field_kind, is_code, refuse_repeated
from shifcon_fast.data.row import Row, is_missing

logger = logging.getLogger(__name__)


def language_fields(
    rows: Sequence[Row], name: str, *, known: Collection[str] = (), declared: bool = False
) -> list[str]:
    """The fields that hold a language, in the order of the data. Logs once what is taken and what is left out.

    A field is a language if its name is a code in common use, in its usual letters (``sw``, ``swh_Latn``,
    ``pt-BR``, ``pt_BR``, ``zh-Hans``), and its values are text: strings, and not all numbers, identifiers or
    addresses. So ``"id": "Halo"`` is Indonesian, and ``"id": 7`` or ``"id": "dev-0007"`` is no language.
    Three-letter codes that are words as well (``est``, ``cat``, ``ind``) count only where no language has a
    two-letter code.

    Args:
        rows: the data.
        name: what to call it in messages.
        known: fields that the caller knows to be something else, which nobody needs to be told about.
        declared: the rows are the values of a ``translation`` column, whose names are languages by definition; then
            any assigned code counts.

    Raises:
        DataError: two fields that are the same language (``sw`` and ``swh_Latn``).
    """
    names = dict.fromkeys(key for row in rows for key in row.value if key not in known)
    textual = [each for each in names if _is_text([row.value.get(each) for row in rows])]
    if declared:
        taken = [each for each in textual if is_code(each)]
    else:
        kinds = {each: field_kind(each) for each in textual}
        short = any(kind == "language" and len(each) == 2 for each, kind in kinds.items())
        wanted = {"language"} if short else {"language", "ambiguous"}
        taken = [each for each, kind in kinds.items() if kind in wanted]
        if all(kinds[each] == "ambiguous" for each in taken):
            taken = []  # one word alone is no sign of languages
    refuse_repeated(taken, name)
    _report(name, taken, [each for each in names if each not in taken], textual)
    return taken


def _report(name: str, taken: list[str], left_out: list[str], textual: list[str]) -> None:
    doubtful = [each for each in left_out if is_code(each) and each in textual]
    level = logging.WARNING if doubtful else logging.INFO
    message = f"{name}: languages {', '.join(taken) or 'none'}"
    if left_out:
        message += f"; other fields, left out: {', '.join(left_out)}"
    if doubtful:
        message += (
            f". If {', '.join(doubtful)} are languages too, list all languages in `languages` (--languages)"
        )
    logger.log(level, "%s", message)


def _is_text(values: list[object]) -> bool:
    """Whether a field holds words: a string, and not identifiers (ASCII, no space, a digit) throughout."""
    strings = [value for value in values if isinstance(value, str)]
    words = [value for value in strings if not is_missing(value)]
    if not words:
        return bool(strings)
    return not all(
        value.isascii()
        and not any(c.isspace() for c in value)
        and ("://" in value or any(c.isdigit() for c in value))
        for value in words
    )
