"""Read the final number of an answer, exactly, in the scripts and number formats of many languages.

Every value is a :class:`fractions.Fraction`: 0.1 is one tenth, and ``2.50`` equals ``2.5``. What is read:

* decimal digits of every script (``unicodedata.decimal``: ASCII, full-width, Arabic-Indic, Devanagari, Thai
  ...);
* signs ``-`` ``−`` ``–`` ``－`` where they are signs: not in ``3-4``, ``74 -35`` or ``F-16``;
* thousands separators: comma, dot, apostrophe, no-break and narrow spaces, Arabic ``٬``; Western groups
  (1,234,567) and Indian ones (12,34,567); a plain space where the language writes it so (``12 345`` in French
  or Russian);
* decimal separators: dot, comma, Arabic ``٫``;
* fractions (``3/4``, ``2 1/2``, ``½``), exponents (``1.5e3``), the myriads of Chinese and Japanese
  (``2万5000``, ``3.5亿``), currency and percent signs (``50%`` is 50).

What is skipped: dates, times and ratios (``2020-05-01``, ``12:30``), versions (``1.2.3``), powers (``^2``),
and digits that end a word (``x5``, ``CO2``). Number words ("nine", "half") and spelled-out multipliers
("lakh", "million") are not read.

A separator followed by three digits is ambiguous: ``1.234`` is 1234 in German and 1.234 in English. The
language decides (Unicode CLDR number symbols, https://cldr.unicode.org); where usage is mixed (Spanish),
three digits make a group.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

_MINUS = "\u2212\u2013\u2011\ufe63\uff0d"
_LENGTH_KEEPING = {
    **dict.fromkeys(map(ord, _MINUS), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u202f\u2009\u2007"), "\u00a0"),
    **dict.fromkeys(map(ord, "\u2019\u02bc\uff07"), "'"),
    **{ord(wide): narrow for wide, narrow in zip("．，／％＋＝（）：＾＃", ".,/%+=():^#", strict=True)},
    ord("\u2044"): "/",
    ord("\u060c"): "\u066c",  # the Arabic comma is also typed as a thousands separator
}
_DECIMAL_COMMA = frozenset(
    {"ca", "de", "da", "es", "fr", "gl", "is", "it", "nb", "nl", "no", "pt", "ro", "sv"}
    | {"be", "bg", "bs", "cs", "hr", "lt", "lv", "mk", "pl", "ru", "sk", "sl", "sr", "uk"}
    | {"af", "az", "el", "et", "eu", "fi", "hu", "hy", "id", "ka", "kk", "sq", "tr", "uz", "vi"}
)
_EITHER_GROUPS = frozenset({"es"})  # Spain writes 1.234, Mexico and the United States 1,234
_SPACE_GROUPS = frozenset(
    {"be", "bg", "cs", "et", "fi", "fr", "hu", "hy", "ka", "kk", "lt", "lv", "nb"}
    | {"no", "pl", "pt", "ru", "sk", "sl", "sq", "sv", "uk", "uz"}
    | {"es", "sw", "th"}  # as translations of GSM8K problems write them
)
_CURRENCY_WORDS = frozenset(
    {"us", "usd", "eur", "gbp", "chf", "rub", "tl", "try", "vnd", "thb", "cny", "rmb", "jpy", "nt", "hk"}
    | {"rp", "idr", "rs", "inr", "bdt", "tk", "ksh", "kes", "tsh", "tzs", "sh"}
)
_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC")
_ALPHABETS_OF_NAMES = ("LATIN", "GREEK", "CYRILLIC")

_SEPARATED = r"[0-9]+(?:[.,'\u00a0\u066b\u066c][0-9]+)*"
_CLUSTER = re.compile(_SEPARATED)
_CLUSTER_WITH_SPACES = re.compile(
    rf"[0-9]{{1,3}}(?: [0-9]{{3}})+(?![0-9]|/[0-9])(?:[.,\u066b][0-9]+)?|{_SEPARATED}"
)
_NOT_A_QUANTITY = re.compile(
    r"[0-9]{4}([-/.])[0-9]{1,2}\1[0-9]{1,2}(?![0-9])|(?<![0-9])[0-9]{1,2}([-/.])[0-9]{1,2}\2[0-9]{4}(?![0-9])"
    r"|[0-9]+(?::[0-9]+)+"
)
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]{1,3})(?![0-9A-Za-z])")
_DENOMINATOR = re.compile(r"/([0-9]+)(?![0-9]|[.,/][0-9])")
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_REMAINDER = re.compile(r"([0-9]{1,4})(?![0-9.,万萬])")
_MIXED_FRACTION = re.compile(r" ([0-9]+)/([0-9]+)(?![0-9]|[.,/][0-9])")
_WESTERN = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_INDIAN = re.compile(r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}")


def extract_answer(response: str, language: str | None = None) -> Fraction | None:
    """The final numeric answer of a response: the number after the last ``####``, else the last number, else
    None.

    Args:
        language: ISO 639 code that decides ambiguous separators; None reads ``1,234`` and ``1.5`` the English
        way.
    """
    text = _normalise(response)
    marker = text.rfind("####")
    if marker >= 0 and (after := _numbers(text[marker + 4 :], language)):
        return after[0]
    found = _numbers(text, language)
    return found[-1] if found else None


def find_numbers(text: str, language: str | None = None) -> list[Fraction]:
    """All numbers of a text in order of appearance."""
    return _numbers(_normalise(text), language)


def as_number(answer: object) -> Fraction | None:
    """A gold answer as a number, or None if it is text.

    A string counts as a number when it is one plain ASCII number (``"18"``, ``"-2.5"``, ``"1,234"``,
    ``"3/4"``).
    """
    if isinstance(answer, bool) or answer is None:
        return None
    if isinstance(answer, (int, Fraction, Decimal)):
        return Fraction(answer)
    if isinstance(answer, float):
        return Fraction(repr(answer))  # the shortest decimal that prints like it: 0.1 is one tenth
    text = str(answer).strip()
    if re.fullmatch(
        r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+/0*[1-9][0-9]*)", text
    ):
        return Fraction(text.replace(",", ""))
    return None


def format_number(value: Fraction) -> str:
    """``42``, ``2.5``, or ``1/3`` where no finite decimal exists."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = 0
    while value.denominator > 1:
        value, digits = value * 10, digits + 1
    sign, number = "-" if value < 0 else "", str(abs(value.numerator)).rjust(digits + 1, "0")
    return f"{sign}{number[:-digits]}.{number[-digits:]}"


def _normalise(text: str) -> str:
    """One spelling per digit, sign and separator; invisible format characters (bidi marks, joiners) go."""
    text = "".join(c for c in text.translate(_LENGTH_KEEPING) if unicodedata.category(c) != "Cf")
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def _numbers(text: str, language: str | None) -> list[Fraction]:
    cluster = _CLUSTER_WITH_SPACES if language in _SPACE_GROUPS else _CLUSTER
    found: list[Fraction] = []
    position = 0
    while position < len(text):
        character = text[position]
        if not character.isdecimal():
            if unicodedata.category(character) == "No" and (vulgar := _vulgar(character)) is not None:
                found.append(-vulgar if _negative(text, position) else vulgar)
            position += 1
            continue
        if (skipped := _NOT_A_QUANTITY.match(text, position)) is not None:
            position = skipped.end()
            continue
        match = cluster.match(text, position)
        assert match is not None  # it starts at a digit
        if _belongs_to_a_word(text, position):
            position = match.end()
            continue
        start = position - 1 if _leading_point(text, position) else position
        sign = -1 if _negative(text, start) else 1
        if start < position:
            values, position = (
                [Fraction("0." + match.group())] if match.group().isdecimal() else [],
                match.end(),
            )
        else:
            values, position = _read_cluster(match.group(), language), match.end()
        if len(values) == 1:
            values[0], position = _extend(values[0], text, position, plain=match.group().isdecimal())
        if values:
            values[0] *= sign
        found += values
    return found


def _extend(value: Fraction, text: str, position: int, *, plain: bool) -> tuple[Fraction, int]:
    """What may follow the digits of one number: an exponent, a denominator, a fraction."""
    if exponent := _EXPONENT.match(text, position):
        return value * Fraction(10) ** int(exponent.group(1)), exponent.end()
    if myriad := _MYRIADS.get(text[position : position + 1]):
        remainder = _REMAINDER.match(text, position + 1)
        rest, end = (int(remainder.group(1)), remainder.end()) if remainder else (0, position + 1)
        return value * myriad + rest, end
    if not plain:
        return value, position
    if (over := _DENOMINATOR.match(text, position)) and int(over.group(1)):
        return value / int(over.group(1)), over.end()
    if mixed := _MIXED_FRACTION.match(text, position):
        above, below = int(mixed.group(1)), int(mixed.group(2))
        if 0 < above < below:
            return value + Fraction(above, below), mixed.end()
    if position < len(text) and (vulgar := _vulgar(text[position])) is not None:
        return value + vulgar, position + 1
    return value, position


def _read_cluster(cluster: str, language: str | None) -> list[Fraction]:
    """Digits with separators between them: one number, or several where they are a list (``1,2,3``)."""
    cluster = cluster.replace(" ", "\u00a0")
    separators = re.sub("[0-9]", "", cluster)
    if not separators:
        return [Fraction(cluster)]
    last = separators[-1]
    if len(separators) == 1 and last in ".,":
        before, after = cluster.split(last)
        may_group = len(after) == 3 and len(before) <= 3 and not before.startswith("0")
        if may_group and (language in _EITHER_GROUPS or (last == ".") == (language in _DECIMAL_COMMA)):
            return [Fraction(before + after)]
        return [Fraction(f"{before}.{after}")]
    whole, decimals = cluster, ""
    if last in ".,\u066b" and separators.count(last) == 1:  # the last separator, met once, is the decimal one
        whole, decimals = cluster.rsplit(last, 1)
        separators = separators[:-1]
    if not separators or (
        len(set(separators)) == 1 and separators[0] != "\u066b" and _grouped(whole, separators[0])
    ):
        digits = re.sub("[^0-9]", "", whole)
        return [Fraction(f"{digits}.{decimals}") if decimals else Fraction(digits)]
    pieces = re.split("[^0-9.]", cluster)
    if len(pieces) == 1:
        return []  # only dots, and not groups: a version or an address
    return [value for piece in pieces for value in _read_cluster(piece, language)]


def _grouped(whole: str, separator: str) -> bool:
    """Whether the groups have the lengths that thousands separators give."""
    commas = whole.replace(separator, ",")
    return _WESTERN.fullmatch(commas) is not None or (
        separator == "," and _INDIAN.fullmatch(commas) is not None
    )


def _belongs_to_a_word(text: str, position: int) -> bool:
    """``x5``, ``CO2``, ``a_1``, the 3 of ``2^3``: digits that are no quantity. Currency words are let through."""
    if position == 0:
        return False
    before = text[position - 1]
    if before in "_^" or (before == "." and position > 1 and text[position - 2].isdecimal()):
        return True
    if not before.isalpha() or not unicodedata.name(before, "").startswith(_ALPHABETS_OF_NAMES):
        return False
    start = position
    while start > 0 and text[start - 1].isalpha():
        start -= 1
    return text[start:position].casefold() not in _CURRENCY_WORDS


def _leading_point(text: str, position: int) -> bool:
    """``.5`` at the start of a word is one half."""
    if position == 0 or text[position - 1] != ".":
        return False
    return position == 1 or text[position - 2] in " \t\n\u00a0(=+-*/<>~≈" or _is_currency(text[position - 2])


def _negative(text: str, start: int) -> bool:
    """Whether the number at ``start`` carries a minus sign, and not a hyphen, a range or a subtraction."""
    before = start - 1
    while before >= 0 and _is_currency(text[before]):
        before -= 1
    if before >= 0 and text[before] == " " and before >= 1 and text[before - 1] == "-":
        return text[: before - 1].rstrip().endswith("=")  # "= - 4"; elsewhere a spaced dash is a dash
    if before < 0 or text[before] != "-":
        return False
    ahead = text[:before]
    if ahead.endswith(tuple("0123456789)%")) or ahead.rstrip(" ").endswith(tuple("0123456789)")):
        return False  # "3-4", "74 -35"
    if not ahead or not ahead[-1].isalpha():
        return not ahead.endswith("-")
    return unicodedata.name(ahead[-1], "").startswith(_SPACELESS)


def _is_currency(character: str) -> bool:
    return unicodedata.category(character) == "Sc"


def _vulgar(character: str) -> Fraction | None:
    """``½`` and its kin; superscripts and circled digits are not numbers here."""
    above, slash, below = unicodedata.normalize("NFKC", character).partition("\u2044")
    return Fraction(int(above), int(below)) if slash and above.isdecimal() and below.isdecimal() else None
