"""Numerals of Chinese and Japanese: ``三百二十``, ``2万5千``, ``1億8990万``, ``3.5亿``, ``三分之一``.

Values follow Unicode's kPrimaryNumeric and kAccountingNumeric (https://www.unicode.org/reports/tr38/). ``兆`` is
10^12, except before a unit of measurement, where it is mega- and no numeral (兆瓦), as 千 is kilo- (千克).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = {
    spelling: str(digit)
    for digit, spellings in enumerate(
        ("〇零○", "一壹壱", "二贰貳弐两兩", "三叁參参", "四肆", "五伍", "六陆陸", "七柒", "八捌", "九玖")
    )
    for spelling in spellings
}
_UNITS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8, "兆": 10**12}
_MEASURES = "克米瓦卡焦帕赫伏升字比"

STARTS = "".join([*_DIGITS, *_UNITS])
"""Characters that a numeral can begin with."""

COUNTERS = frozenset("个個人本枚台匹冊名件歳岁只條条张張杯瓶箱盒次回日天年月週周分秒点點元块塊円圆圓")
"""What follows a number in place of a unit: measure words."""

MOST_DIGITS = 1000
"""Digits of the longest number that has a value."""

_TOKEN = re.compile(
    rf"(?P<spelled>[{''.join(_DIGITS)}]+)"
    rf"|(?P<unit>[{''.join(_UNITS)}])(?![{_MEASURES}])"
    rf"|[ \u00a0]?(?P<myriad>[{''.join(_MYRIADS)}])(?![{_MEASURES}])"
    rf"|(?P<digits>[0-9]+(?:,[0-9]{{3}})*(?:\.[0-9]+)?)"
    rf"|[ \u00a0](?P<spaced>[0-9]+(?:\.[0-9]+)?)(?=[ \u00a0]?[{''.join(_MYRIADS)}])"
)
_SHARE = re.compile("分[之の]")


@dataclass(frozen=True)
class Numeral:
    """A numeral up to ``end``.

    Attributes:
        value: None where it has more than 1,000 digits.
        is_written_out: it has digits and units (三百), or says a share (三分之一); other numerals may be parts of
            words (一起, 千万不要, 百万富翁).
    """

    value: Fraction | None
    end: int
    is_written_out: bool


def read_numeral(
    text: str, position: int, first: Fraction | None = None, *, chinese: bool = False
) -> Numeral:
    """Read the numeral at ``position``, or what follows the number ``first`` that ends there (``万5千`` after 2).

    Sections below ten thousand (五千三百) are multiplied by myriads (万, 亿); both get smaller from left to right.

    Args:
        chinese: ``两万五`` is 25,000, as in Chinese; elsewhere 20,005.
    """
    total: Fraction | int = 0
    section: Fraction | int = 0
    waiting: Fraction | int | None = first  # digits whose unit may follow
    smallest_unit, smallest_myriad, last_factor = 10**4, 10**16, 10**16
    end, kind, has_digits, has_units, is_short = position, "", first is not None, False, False
    while (token := _TOKEN.match(text, end)) is not None:
        before, kind = kind, str(token.lastgroup)
        spelling = token.group(kind)
        if kind in ("spelled", "digits", "spaced"):
            if waiting is not None or (kind != "spelled" and not has_units):
                break
            if kind == "spaced" and before != "myriad":
                break
            if len(spelling) > MOST_DIGITS:
                return Numeral(None, token.end(), is_written_out=False)
            digits = "".join(_DIGITS.get(c, c) for c in spelling if c != ",")
            value = Fraction(digits) if "." in digits else int(digits)
            if value >= last_factor:
                break
            waiting, has_digits, is_short = value, True, kind == "spelled" and len(spelling) == 1
        else:
            factor = (_UNITS if kind == "unit" else _MYRIADS)[spelling]
            counted = section + (waiting or 0)
            if kind == "unit" and factor < smallest_unit:
                section += (1 if waiting is None else waiting) * factor
                smallest_unit = factor
            elif kind == "myriad" and counted and factor < smallest_myriad:
                total, section = total + counted * factor, 0
                smallest_unit, smallest_myriad = 10**4, factor
            elif kind == before == "myriad" and not counted:
                total *= factor  # 万亿
            else:
                break
            waiting, last_factor, has_units, is_short = None, factor, True, False
        end = token.end()
    if chinese and is_short and has_units and last_factor >= 100 and waiting is not None:
        waiting *= Fraction(last_factor, 10)
    value = Fraction(total + section + (waiting or 0))
    return _read_share(text, Numeral(value, end, is_written_out=has_digits and has_units))


def _read_share(text: str, whole: Numeral) -> Numeral:
    """``3分之1`` and ``三分の一`` are one third; ``10分の休憩`` is ten minutes."""
    if not whole.value or (found := _SHARE.match(text, whole.end)) is None:
        return whole
    if plain := re.compile(r"[0-9]{1,9}(?![0-9])").match(text, found.end()):
        part, end = Fraction(plain.group()), plain.end()
    else:
        spelled = _TOKEN.match(text, found.end())
        if spelled is None or spelled.lastgroup != "spelled" or len(spelled.group()) > 9:
            return whole
        part, end = Fraction("".join(map(_DIGITS.__getitem__, spelled.group()))), spelled.end()
    return Numeral(part / whole.value, end, is_written_out=True) if 0 < part < whole.value else whole
