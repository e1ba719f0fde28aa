"""Numbers in running text, exactly, in the scripts and number formats of many languages.

Every value is a :class:`fractions.Fraction`: 0.1 is one tenth, and ``2.50`` equals ``2.5``. What is read:

* decimal digits of every script (``unicodedata.decimal``: ASCII, full-width, Arabic-Indic, Devanagari, Thai
  ...); characters without a shape of their own (direction marks, joiners, soft hyphens) are not there;
* signs ``-`` ``−`` ``–`` ``－`` where they are signs: not in ``3-4``, ``74 -35`` or ``F-16``;
* thousands separators: comma, dot, apostrophe, no-break and narrow spaces, Arabic ``٬``; Western groups
  (1,234,567) and Indian ones (12,34,567); a plain space where the language writes it so (``12 345`` in French
  or Russian);
* decimal separators: dot, comma, Arabic ``٫``;
* fractions (``3/4``, ``2 1/2``, ``½``), exponents (``1.5e3``, ``1.5 × 10^3``), currency and percent signs
  (``50%`` is 50);
* Chinese and Japanese numerals: ``2万5千``, ``3.5亿``, ``三百二十``, ``三分之一``, ``百分之五`` (5). A numeral
  without a unit (``三``) is a number where a number is expected, and a word elsewhere (``一起``).

What is skipped: dates, times and ratios (``2020-05-01``, ``12:30``), versions (``1.2.3``), powers (``^2``), roots,
and digits that end a word (``x5``, ``CO2``). Number words ("nine", "half") and spelled-out multipliers
("million", "lakh", "crore") are not read.

A separator followed by three digits is ambiguous: ``1.234`` is 1234 in German and 1.234 in English. The
language decides (Unicode CLDR number symbols, https://cldr.unicode.org, through Babel); where usage is mixed
(Spanish), three digits make a group.

Text comes from a model, so it may be anything: every step takes time in proportion to the text's length, and a
number of more than 1,000 digits, or an exponent beyond ±1,000, has no value (None), since it answers nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from shifcon_fast.evaluation.hanzi import COUNTERS, MOST_DIGITS, STARTS, read_numeral
from shifcon_fast.evaluation.number_style import NumberStyle, is_spaceless, number_style

_MINUS = "\u2212\u2013\u2010\u2011\ufe63\uff0d"
_SPELLINGS = {
    **dict.fromkeys(map(ord, _MINUS), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u202f\u2009\u2007"), "\u00a0"),
    **dict.fromkeys(map(ord, "\u2019\u02bc\uff07"), "'"),
    **{ord(wide): narrow for wide, narrow in zip("．，／％＋＝（）：＾＃＄￥", ".,/%+=():^#$¥", strict=True)},
    **dict.fromkeys(map(ord, "\u2044\u2215"), "/"),
    ord("\u060c"): "\u066c",  # the Arabic comma is also typed as a thousands separator
}
# Without a shape of their own, and not of Unicode's category Cf: the combining grapheme joiner, Hangul fillers,
# Khmer's inherent vowels, and the keycap that makes an emoji of a digit. Variation selectors are ranges.
_SHAPELESS = frozenset("\u034f\u115f\u1160\u3164\uffa0\u17b4\u17b5\u20e3")
CURRENCY_WORDS = frozenset(
    {"us", "usd", "eur", "gbp", "chf", "rub", "tl", "try", "vnd", "thb", "cny", "rmb", "jpy", "nt", "hk"}
    | {"rp", "idr", "rs", "inr", "bdt", "tk", "ksh", "kes", "tsh", "tzs", "sh"}
)
_ALPHABETS_OF_NAMES = ("LATIN", "GREEK", "CYRILLIC")

_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"
_START = re.compile(rf"[0-9{_VULGAR}{STARTS}]")
_SEPARATED = r"[0-9]+(?:[.,'\u00a0\u066b\u066c][0-9]+)*"
_CLUSTER = re.compile(_SEPARATED)
_CLUSTER_WITH_SPACES = re.compile(
    rf"[0-9]{{1,3}}(?: [0-9]{{3}})+(?![0-9]|/[0-9])(?:[.,\u066b][0-9]+)?|{_SEPARATED}"
)
_NOT_A_QUANTITY = re.compile(
    r"[0-9]{4}([-/.])[0-9]{1,2}\1[0-9]{1,2}(?![0-9])|(?<![0-9])[0-9]{1,2}([-/.])[0-9]{1,2}\2[0-9]{4}(?![0-9])"
    r"|[0-9]+(?::[0-9]+)+"
)
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]+)(?![0-9A-Za-z])")
_TIMES_POWER = re.compile(r"\s?[×x*·⋅]\s?10(?:\^\(?([+-]?[0-9]+)\)?|([⁺⁻]?[⁰¹²³⁴-⁹]+))(?![0-9])")
_DENOMINATOR = re.compile(rf"/([0-9]{{1,{MOST_DIGITS}}})(?![0-9]|[.,/][0-9])")
_MIXED_FRACTION = re.compile(rf" ([0-9]{{1,{MOST_DIGITS}}})/([0-9]{{1,{MOST_DIGITS}}})(?![0-9]|[.,/][0-9])")
_MIXED_VULGAR = re.compile(rf" ?([{_VULGAR}])")
_IRRATIONAL = re.compile(r" ?[√π]")
_WESTERN = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_INDIAN = re.compile(r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}")


@dataclass(frozen=True)
class Number:
    """A number of a normalised text, ``text[start:end]`` without its sign; value None: more than 1,000 digits."""

    start: int
    end: int
    value: Fraction | None


def find_numbers(text: str, language: str | None = None) -> list[Fraction]:
    """All numbers of a text in order of appearance.

    Args:
        language: code that decides ambiguous separators; None reads ``1,234`` and ``1.5`` the English way.
    """
    return [found.value for found in scan(normalise(text), language) if found.value is not None]


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


def visible(text: str) -> str:
    """The text without characters that have no shape: direction marks, joiners, soft hyphens, BOM, selectors."""
    return text.translate({ord(c): None for c in set(text) if not c.isascii() and _is_shapeless(c)})


def normalise(text: str) -> str:
    """NFC, without shapeless characters, and with one spelling of each digit, sign and separator."""
    text = unicodedata.normalize("NFC", visible(text))
    digits = {ord(c): str(unicodedata.decimal(c)) for c in set(text) if not c.isascii() and c.isdecimal()}
    return text.translate({**_SPELLINGS, **digits})


def scan(
    text: str,
    language: str | None = None,
    start: int = 0,
    end: int | None = None,
    *,
    expected: bool = False,
) -> Iterator[Number]:
    """The numbers of a normalised text that begin in ``text[start:end]``; what stands before them counts for signs.

    Args:
        expected: a number is expected here, so that ``三`` is one.
    """
    style = number_style(language)
    cluster = _CLUSTER_WITH_SPACES if style.space_groups else _CLUSTER
    position, end = start, len(text) if end is None else end
    percent = -1  # where a number is expected, since 百分之 stands before it
    while (found := _START.search(text, position, end)) is not None:
        start = position = found.start()
        values: list[Fraction | None]
        if text.startswith("百分之", start):
            position = percent = start + 3
            continue
        if text[start] in _VULGAR:
            values, position = [_vulgar(text[start])], start + 1
        elif not text[start].isascii():
            numeral = read_numeral(text, start, chinese=style.short_hanzi)
            position = max(numeral.end, start + 1)
            is_word = numeral.end == start or _continues_a_word(text, numeral.end)
            likely = expected or start == percent or numeral.end - start > 1
            if not numeral.is_written_out and (is_word or not likely):
                continue
            values = [numeral.value]
        elif (skipped := _NOT_A_QUANTITY.match(text, start)) is not None:
            position = skipped.end()
            continue
        else:
            match = cluster.match(text, start)
            assert match is not None  # it starts at a digit
            position = match.end()
            if _belongs_to_a_word(text, start):
                continue
            if _leading_point(text, start):
                start -= 1
                values = [_fraction("0", match.group())] if match.group().isdecimal() else []
            else:
                values = _read_cluster(match.group(), style)
            if len(values) == 1:
                plain = match.group().isdecimal()
                values[0], position = _extend(values[0], text, position, style, plain=plain)
        if _IRRATIONAL.match(text, position):
            values = [None]  # 3√2 and 2π are not 3 and 2
        if values and values[0] is not None and _negative(text, start):
            values[0] = -values[0]
        yield from (Number(start, position, value) for value in values)


# --- digits and what follows them -------------------------------------------------------------------------------


def _fraction(whole: str, decimals: str = "") -> Fraction | None:
    if len(whole) + len(decimals) > MOST_DIGITS:
        return None
    return Fraction(int(whole + decimals), 10 ** len(decimals))


def _read_cluster(cluster: str, style: NumberStyle) -> list[Fraction | None]:
    """Digits with separators between them: one number, or several where they are a list (``1,2,3``)."""
    cluster = cluster.replace(" ", "\u00a0")
    separators = re.sub("[0-9]", "", cluster)
    if not separators:
        return [_fraction(cluster)]
    last = separators[-1]
    if len(separators) == 1 and last in ".,":
        before, after = cluster.split(last)
        may_group = len(after) == 3 and len(before) <= 3 and not before.startswith("0")
        if may_group and (style.either_groups or (last == ".") == style.decimal_comma):
            return [_fraction(before + after)]
        return [_fraction(before, after)]
    whole, decimals = cluster, ""
    if last in ".,\u066b" and separators.count(last) == 1:  # the last separator, met once, is the decimal one
        whole, decimals = cluster.rsplit(last, 1)
        separators = separators[:-1]
    if not separators or (
        len(set(separators)) == 1 and separators[0] != "\u066b" and _grouped(whole, separators[0])
    ):
        return [_fraction(re.sub("[^0-9]", "", whole), decimals)]
    pieces = re.split("[^0-9.]", cluster)
    if len(pieces) == 1:
        return []  # only dots, and not groups: a version or an address
    return [value for piece in pieces for value in _read_cluster(piece, style)]


def _grouped(whole: str, separator: str) -> bool:
    """Whether the groups have the lengths that thousands separators give."""
    commas = whole.replace(separator, ",")
    return _WESTERN.fullmatch(commas) is not None or (
        separator == "," and _INDIAN.fullmatch(commas) is not None
    )


def _extend(
    value: Fraction | None, text: str, position: int, style: NumberStyle, *, plain: bool
) -> tuple[Fraction | None, int]:
    """What may follow the digits of one number: an exponent, hanzi units, a denominator, a fraction."""
    if exponent := _EXPONENT.match(text, position):
        return _times_power_of_ten(value, exponent.group(1)), exponent.end()
    if power := _TIMES_POWER.match(text, position):
        digits = power.group(1) or unicodedata.normalize("NFKC", power.group(2)).replace("\u2212", "-")
        return _times_power_of_ten(value, digits), power.end()
    if value is None:
        return None, position
    if (numeral := read_numeral(text, position, value, chinese=style.short_hanzi)).end > position:
        return numeral.value, numeral.end
    if not plain:
        return value, position
    if (over := _DENOMINATOR.match(text, position)) and int(over.group(1)):
        return value / int(over.group(1)), over.end()
    if mixed := _MIXED_FRACTION.match(text, position):
        above, below = int(mixed.group(1)), int(mixed.group(2))
        if 0 < above < below:
            return value + Fraction(above, below), mixed.end()
    if mixed := _MIXED_VULGAR.match(text, position):
        return value + _vulgar(mixed.group(1)), mixed.end()
    return value, position


def _times_power_of_ten(value: Fraction | None, digits: str) -> Fraction | None:
    if value is None or len(digits) > 5 or abs(int(digits)) > MOST_DIGITS:
        return None
    return value * Fraction(10) ** int(digits)


# --- what stands before a number --------------------------------------------------------------------------------


def _belongs_to_a_word(text: str, position: int) -> bool:
    """``x5``, ``CO2``, ``a_1``, the 3 of ``2^3``: digits that are no quantity. Currency words are let through."""
    if position == 0:
        return False
    before = text[position - 1]
    further = text[position - 2] if position > 1 else ""
    if before in "^√" or (before == "_" and further.isalnum()) or (before == "." and further.isdecimal()):
        return True
    if not before.isalpha() or not unicodedata.name(before, "").startswith(_ALPHABETS_OF_NAMES):
        return False
    start = position
    while start > 0 and text[start - 1].isalpha():
        start -= 1
    return text[start:position].casefold() not in CURRENCY_WORDS


def _continues_a_word(text: str, position: int) -> bool:
    """Whether what stands at ``position`` makes a word of the hanzi before it: 一样, but not 一个."""
    return text[position : position + 1].isalpha() and text[position] not in COUNTERS


def _leading_point(text: str, position: int) -> bool:
    """``.5`` at the start of a word is one half."""
    if position == 0 or text[position - 1] != ".":
        return False
    return (
        position == 1 or text[position - 2] in " \t\n\u00a0(=+-*/<>~≈\x02" or is_currency(text[position - 2])
    )


def _negative(text: str, start: int) -> bool:
    """Whether the number at ``start`` carries a minus sign, and not a hyphen, a range or a subtraction."""
    before = start - 1
    while before >= 0 and is_currency(text[before]):
        before -= 1
    if before >= 1 and text[before] == " " and text[before - 1] == "-":
        ahead = _last_before(text, before - 1, " \n\t\u00a0")
        return text[ahead : ahead + 1] == "="  # "= - 4"; elsewhere a spaced dash is a dash
    if before < 0 or text[before] != "-":
        return False
    if before == 0:
        return True
    ahead = _last_before(text, before, " ")
    if (ahead >= 0 and text[ahead] in "0123456789)") or text[before - 1] == "%":
        return False  # "3-4", "74 -35"
    if not text[before - 1].isalpha():
        return text[before - 1] != "-"
    return is_spaceless(text[before - 1])


def _last_before(text: str, position: int, blanks: str) -> int:
    """Index of the last character before ``position`` that is not one of ``blanks``; -1 where there is none."""
    position -= 1
    while position >= 0 and text[position] in blanks:
        position -= 1
    return position


def is_currency(character: str) -> bool:
    """Whether a character is a currency sign."""
    return unicodedata.category(character) == "Sc"


def _is_shapeless(character: str) -> bool:
    return (
        unicodedata.category(character) == "Cf"
        or character in _SHAPELESS
        or "\ufe00" <= character <= "\ufe0f"
        or "\U000e0100" <= character <= "\U000e01ef"
    )


def _vulgar(character: str) -> Fraction:
    """``½`` and its kin."""
    above, _, below = unicodedata.normalize("NFKC", character).partition("\u2044")
    return Fraction(int(above), int(below))
