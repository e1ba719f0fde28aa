"""One row of a data source: where it stands, and what its fields may hold."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

from shifcon_fast.data.errors import DataError

_BLANK_LETTERS = frozenset("\u115f\u1160\u3164\uffa0\u2800")  # Hangul fillers and the blank Braille pattern


@dataclass(frozen=True)
class Row:
    """One record and where it stands (``file.jsonl:12``, or ``owner/name[train] row 11``), for error messages."""

    where: str
    value: dict[str, Any]


def is_missing(value: object) -> bool:
    """Whether a field holds nothing: null, NaN, or a string without one visible character."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' own
        return True
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, str) and all(
        c.isspace() or c in _BLANK_LETTERS or unicodedata.category(c) in ("Cc", "Cf") for c in value
    )


def check_text(value: object, where: str, what: str, *, if_empty: str = "") -> str:
    """Return ``value`` if it is a string with something in it that UTF-8 can encode; raise DataError otherwise.

    ``if_empty``: what else can be done about an empty one, for the message.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {_kind(value)}; wanted a string")
    if is_missing(value):
        invisible = ", nothing but invisible characters" if value.strip() else ""
        raise DataError(f"{where}: {what} is empty{invisible}; wanted a sentence{if_empty}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} holds half of a surrogate pair ({error.reason}); wanted text"
        ) from None
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} ({str(value)[:40]})"
