"""What a response answers, and whether it is right.

The answer of a response is, in this order:

1. the last ``\\boxed{…}`` or ``#### …`` that holds a number (``#### Step 2: …`` is a heading);
2. the last "the answer is …" or "Answer: …", in any language of
   :data:`shifcon_fast.evaluation.answer_words.ANSWER_WORDS`, with the number right behind it; of an equation, what
   stands after the last ``=``;
3. the last number.

What follows a new question ("Question: …", a new turn) after the first words is not read. A gold answer that is a
number is compared as a number, exactly: 18 = 18.0, but 3.33 ≠ 10/3. Any other is compared as text: the whole
response, or what it marks as its answer, after :func:`normalise_text`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

from shifcon_fast.evaluation.answer_words import ANSWER_WORDS, TURN_TOKENS, TURNS
from shifcon_fast.evaluation.hanzi import COUNTERS, MOST_DIGITS
from shifcon_fast.evaluation.latex import BOX, BOX_END, to_plain
from shifcon_fast.evaluation.number_style import is_unit, number_style
from shifcon_fast.evaluation.numeric import (
    CURRENCY_WORDS,
    Number,
    format_number,
    is_currency,
    normalise,
    scan,
    visible,
)

GoldAnswer = int | float | str | Fraction | Decimal

_MOST_MARKERS = 50  # the last ones of a response; more than these say nothing
_MOST_CHARACTERS = 400  # of what a marker marks
_MOST_LETTERS_AFTER = 15  # a unit behind the number of "Answer: 18 dollars", and no sentence

_COLON = r"\s?[*_]*\s?[:：]"


def _alternatives(field: str, *, spaces: bool) -> str:
    found = [getattr(words, field) for words in ANSWER_WORDS.values() if words.spaces == spaces]
    return normalise("|".join(pattern for pattern in found if pattern))


def _words(field: str, ending: str = "") -> str:
    """Words of all languages; where there are spaces, they begin at one."""
    spaced, joined = _alternatives(field, spaces=True), _alternatives(field, spaces=False)
    return rf"(?:(?<!\w)(?:{spaced}){f'|(?:{joined})' if joined else ''}){ending}"


_MARKERS = re.compile(
    rf"(?P<box>{BOX})|(?P<hash>\#{{4,}})"
    rf"|(?P<states>{_words('states')})|(?P<head>{_words('heads', _COLON)})|(?P<direct>{_words('direct')}(?=\s))",
    re.IGNORECASE,
)
_QUESTIONS = sorted(
    {re.escape(normalise(word)) for words in ANSWER_WORDS.values() for word in words.questions}
)
_NEXT_QUESTION = re.compile(
    rf"(?<!\w)(?P<word>(?:{'|'.join(_QUESTIONS)})\s?[0-9]{{0,3}}{_COLON})"
    rf"|^[ \t]*(?P<turn>{'|'.join(map(re.escape, TURNS))})|(?P<token>{'|'.join(map(re.escape, TURN_TOKENS))})",
    re.MULTILINE,
)
_BLANKS = re.compile(r"[\s:：*\"«„“]*")
_SENTENCE_END = re.compile(rf"[.!?](?=\s|\Z)|[。।！？\n{BOX_END}]")
_GAP = re.compile(
    rf"(?:[^\w\n]|_)*(?:(?:{'|'.join(sorted(CURRENCY_WORDS))})\b[^\w\n]{{0,2}})?", re.IGNORECASE
)
_OPERATION = re.compile(r"\s*[+×·÷*/^]\s*[0-9(√]|\s+-\s+[0-9(]")
_LIST_ITEM = re.compile(r"[.):][ \t]+[^\W\d_]")
_QUOTES_AND_DASHES = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u2032`´"), "'"),
    **dict.fromkeys(map(ord, "“”„«»″"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-"),
}


@dataclass(frozen=True)
class Gold:
    """The accepted answers of a question; a response is right if it gives one of them.

    Attributes:
        numbers: exact values. Two for a text that can be read in two ways (``1,234`` in German).
        texts: normalised; empty where every accepted answer is a number.
        shown: for people.
    """

    numbers: tuple[Fraction, ...]
    texts: tuple[str, ...]
    shown: str


def read_gold(answer: GoldAnswer | Sequence[GoldAnswer], language: str | None = None) -> Gold:
    """Read a gold answer, or a list of accepted ones: numbers, numbers as text, worked solutions, or words.

    Of a worked solution (GSM8K's ``… 36 books.\\n#### 36``, MATH's ``\\boxed{36}``, MGSM's ``The answer is 36.``)
    the marked answer counts. A number may have a sign, a currency or a unit that CLDR knows (``$18``, ``50%``,
    ``18 cm``); in the number format of the language or of English: where these differ both count.

    Raises:
        ValueError: no answer, an empty one, True or False, a number that is not finite or has more than 1,000
            digits.
    """
    accepted: list[Any] = list(answer) if isinstance(answer, (list, tuple)) else [answer]
    if not accepted:
        raise ValueError("answer is an empty list; wanted at least one accepted answer")
    numbers: dict[Fraction, None] = {}
    texts: dict[str, None] = {}
    shown = []
    for one in accepted:
        _check(one)
        values, text = _read_one(one, language)
        numbers.update(dict.fromkeys(values))
        if not values:
            texts[normalise_text(text)] = None
        shown.append(" or ".join(map(format_number, values)) or str(one).strip())
    return Gold(tuple(numbers), tuple(texts), " or ".join(shown))


def _check(answer: object) -> None:
    if isinstance(answer, bool) or not isinstance(answer, (int, float, str, Fraction, Decimal)):
        raise ValueError(f"answer is {answer!r}; wanted a number or a text")
    if isinstance(answer, str):
        if not normalise_text(answer):
            raise ValueError(f"answer is {answer!r}, which is empty; wanted a number or a text")
    elif isinstance(answer, (float, Decimal)) and not Decimal(answer).is_finite():
        raise ValueError(f"answer is {answer}; wanted a finite number or a text")


def _read_one(answer: GoldAnswer, language: str | None) -> tuple[list[Fraction], str]:
    """The values of one accepted answer, none where it is a text; and the text."""
    if not isinstance(answer, str):
        value = as_number(answer)
        assert value is not None  # checked
        return [value], str(value)
    plain = normalise(to_plain(visible(answer)))
    marked = _marked_texts(plain)
    for text in marked or [plain]:
        if values := [value for code in (language, None) if (value := as_number(text, code)) is not None]:
            return list(dict.fromkeys(values)), text
    stated = _stated_number(plain, language) if marked else None
    if stated is not None and stated.value is not None:
        return [stated.value], plain
    return [], (marked or [plain])[0]


def as_number(answer: object, language: str | None = None) -> Fraction | None:
    """A gold answer as a number; None if it is text: no number, several, or one among words that are no unit."""
    if isinstance(answer, bool) or answer is None:
        return None
    if isinstance(answer, Decimal) and abs(answer.adjusted()) > MOST_DIGITS:
        raise ValueError(f"answer has an exponent of {answer.adjusted()}; wanted at most {MOST_DIGITS}")
    if isinstance(answer, (int, Fraction, Decimal)):
        value = Fraction(answer)
        if max(abs(value.numerator), value.denominator) >= 10**MOST_DIGITS:
            raise ValueError(f"answer has more than {MOST_DIGITS} digits; wanted a shorter number")
        return value
    if isinstance(answer, float):
        return Fraction(repr(answer))  # the shortest decimal that prints like it: 0.1 is one tenth
    text = re.sub(r"\s*/\s*", "/", normalise(to_plain(visible(str(answer)))).strip(f" \n\t{BOX}{BOX_END}"))
    found = list(islice(scan(text, language, expected=True), 2))
    if len(found) != 1 or found[0].value is None:
        return None
    number, value = found[0], found[0].value
    if re.fullmatch(r"[0-9]+,[0-9]{1,2}", text) and not number_style(language).decimal_comma:
        return None  # a list of two, or another language's decimals
    before, after = text[: number.start].strip(" \u00a0+(=~≈"), text[number.end :].strip(" \u00a0),.。।")
    is_negative = before.endswith("-")  # scan has seen the sign unless a space follows it
    if is_negative and text[number.start - 1] == " ":
        value = -value
    before = before.removesuffix("-").removeprefix("-").strip()
    if not all(_is_unit(words, language) for words in (before, after) if words):
        return None
    return value


def _is_unit(words: str, language: str | None) -> bool:
    words = "".join(c for c in words if not is_currency(c) and c not in "%٪‰°").strip()
    return (
        not words or set(words) <= COUNTERS or is_unit(words.replace("^2", "²").replace("^3", "³"), language)
    )


def extract_answer(response: str, language: str | None = None) -> Fraction | None:
    """The answer of a response as a number; None where there is no number, or one of more than 1,000 digits.

    Args:
        language: code that decides ambiguous separators; None reads ``1,234`` and ``1.5`` the English way.
    """
    text = normalise(to_plain(visible(response)))
    for part in (before_next_question(text), text):
        if (found := _stated_number(part, language)) is not None:
            return found.value
        if last := deque(scan(part, language), maxlen=1):
            return last[0].value
    return None


def is_correct(
    response: str, answer: GoldAnswer | Sequence[GoldAnswer] | Gold, language: str
) -> tuple[bool, str | None]:
    """Whether a response gives the answer, and what was read out of it."""
    gold = answer if isinstance(answer, Gold) else read_gold(answer, language)
    number = extract_answer(response, language) if gold.numbers else None
    if number in gold.numbers:
        assert number is not None
        return True, format_number(number)
    if not gold.texts:
        return False, None if number is None else format_number(number)
    plain = before_next_question(normalise(to_plain(visible(response))))
    readings = [normalise_text(text) for text in (plain, *_marked_texts(plain))]
    right = [reading for reading in readings if reading in gold.texts]
    return bool(right), right[0] if right else readings[-1]


def normalise_text(text: str) -> str:
    """NFKC, case folded, without invisible characters, with one kind of quotes and dashes, white space joined.

    White space and punctuation at the ends go as well; inside it stays.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible(text)).casefold())
    text = text.replace("i\u0307", "i").translate(_QUOTES_AND_DASHES)  # İ of Turkish, folded
    text = " ".join(text.split())
    return text.strip("".join({c for c in text if unicodedata.category(c).startswith(("P", "Z", "C"))}))


def before_next_question(text: str) -> str:
    """A response without the new question, or the new turn, that the model goes on with after its first words."""
    first = re.search(r"\w", text)
    for found in _NEXT_QUESTION.finditer(text):
        if first is not None and found.start(str(found.lastgroup)) > first.start():
            return text[: found.start()]
    return text


def _stated_number(text: str, language: str | None) -> Number | None:
    """The number that a normalised response marks as its answer: by a box or ####, else by words."""
    found = (_marked_number(text, marker, language) for marker in _last_markers(text))
    return next((number for number in found if number is not None), None)


def _last_markers(text: str) -> list[re.Match[str]]:
    """Boxes and ####, then words; of each the last ones, the last first."""
    explicit: deque[re.Match[str]] = deque(maxlen=_MOST_MARKERS)
    verbal: deque[re.Match[str]] = deque(maxlen=_MOST_MARKERS)
    for marker in _MARKERS.finditer(text):
        (explicit if marker.lastgroup in ("box", "hash") else verbal).append(marker)
    return [*reversed(explicit), *reversed(verbal)]


def _marked_number(text: str, marker: re.Match[str], language: str | None) -> Number | None:
    """The number behind a marker, if it is one that the marker may mean."""
    kind = marker.lastgroup
    start, end = _marked_span(text, marker)
    equals = text.rfind("=", start, end)
    number = next(scan(text, language, max(start, equals + 1), end, expected=True), None)
    if number is None or _OPERATION.match(text, number.end, end):
        return None
    if kind == "box":
        return number
    if _GAP.fullmatch(text, max(start, equals + 1), number.start) is None:
        return None
    if kind == "states":
        return number
    if kind == "hash":
        return None if _LIST_ITEM.match(text, number.end, end) else number
    rest = text[number.end : end]
    letters = sum(unicodedata.category(c)[0] in "LM" for c in rest)
    return number if equals < 0 and letters <= _MOST_LETTERS_AFTER and not re.search("[0-9]", rest) else None


def _marked_texts(text: str) -> list[str]:
    """What a normalised response marks as its answer, if it does: its line, and the first sentence of it."""
    for marker in _last_markers(text):
        start, end = _marked_span(text, marker)
        if text[start:end].strip():
            sentence = _SENTENCE_END.search(text, start, end)
            spans = [(start, end), *([(start, sentence.start())] if sentence else [])]
            return [text[first:last].strip() for first, last in spans]
    return []


def _marked_span(text: str, marker: re.Match[str]) -> tuple[int, int]:
    """Where what a marker marks begins and ends: the box, the line, or, after words, the sentence."""
    blanks = _BLANKS.match(text, marker.end(), marker.end() + _MOST_CHARACTERS)
    start = blanks.end() if blanks and marker.lastgroup != "box" else marker.end()
    limit = min(len(text), start + _MOST_CHARACTERS)
    if marker.lastgroup == "box":
        end = text.find(BOX_END, start, limit)
    elif marker.lastgroup in ("states", "direct"):
        found = _SENTENCE_END.search(text, start, limit)
        end = found.start() if found else -1
    else:
        end = text.find("\n", start, limit)
    return start, end if end >= 0 else limit
