"""How languages write numbers, and what they call currencies and units: Unicode CLDR, through Babel."""

from __future__ import annotations

import logging
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from shifcon_fast.data.languages import primary_code
from shifcon_fast.extras import needed_for

if TYPE_CHECKING:
    from babel import Locale

logger = logging.getLogger(__name__)

_SPACE_GROUPS = frozenset({"es", "pt", "sw", "th"})  # as translations of GSM8K have them, unlike CLDR
_EITHER_GROUPS = frozenset({"es"})  # Spain writes 1.234, Mexico and the United States 1,234
_MORE_UNITS = frozenset({"%", "percent", "dollars", "dollar", "cents", "cent", "bucks", "usd", "eur"})
_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC")


@dataclass(frozen=True)
class NumberStyle:
    """Whether the decimal sign is a comma, a plain space may stand between thousands, both signs may, and 两万五 is
    25,000.
    """

    decimal_comma: bool = False
    space_groups: bool = False
    either_groups: bool = False
    short_hanzi: bool = False


ENGLISH = NumberStyle()


@lru_cache(maxsize=1024)
def number_style(language: str | None) -> NumberStyle:
    """The style of a language (``de``, ``pt-BR``); English for None and, with one warning, for unknown codes."""
    if language is None:
        return ENGLISH
    if (locale := _locale(language)) is None:
        logger.warning("no number format is known for %r: numbers are read as in English (1,234.5)", language)
        return ENGLISH
    symbols = locale.number_symbols["latn"]
    return NumberStyle(
        decimal_comma=symbols["decimal"] == ",",
        space_groups=symbols["group"].isspace() or locale.language in _SPACE_GROUPS,
        either_groups=locale.language in _EITHER_GROUPS and locale.territory is None,
        short_hanzi=locale.language in ("zh", "yue"),
    )


def is_unit(text: str, language: str | None) -> bool:
    """Whether every word of ``text`` occurs in the names of currencies and units (``km/h``, ``US dollars``)."""
    known, words = _unit_words(language) | _unit_words("en"), _words(text)
    return bool(words) and all(
        word in known or (is_spaceless(word[0]) and any(word in name for name in known)) for word in words
    )


def is_spaceless(character: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return unicodedata.name(character, "").startswith(_SPACELESS)


def _words(text: str) -> list[str]:
    return re.split(r"[\s\u00a0-]+", text.casefold().strip()) if text.strip() else []


@lru_cache(maxsize=64)
def _unit_words(language: str | None) -> frozenset[str]:
    locale = _locale(language or "en")
    if locale is None:
        return _MORE_UNITS
    with needed_for("reading units in answers"):
        from babel.numbers import get_currency_name
        from babel.units import format_unit

    names = [*locale.currency_symbols.values()]
    names += [
        get_currency_name(str(code), count, locale) for code in locale.currencies for count in (1, 2, 5)
    ]
    for unit in locale.unit_display_names:
        for length in ("long", "short"):
            for count in (1, 2, 5):
                names.append(re.sub(r"\d", "", format_unit(count, str(unit), length, locale=locale)))
    return _MORE_UNITS | {word.strip(".") for name in names for word in _words(name)}


@lru_cache(maxsize=1024)
def _locale(language: str) -> Locale | None:
    """The CLDR locale of a code, or of its language alone; None where CLDR has neither."""
    with needed_for("reading numbers in answers"):
        from babel import Locale, UnknownLocaleError

    for code in (language.replace("-", "_"), primary_code(language)):
        try:
            return Locale.parse(code)
        except (UnknownLocaleError, ValueError):
            continue
    return None
