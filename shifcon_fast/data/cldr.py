"""Multiple choice from CLDR: what a model knows in English, asked in other languages.

Official language, currency and continent of the member states of the United Nations, with the names that Unicode's
`Common Locale Data Repository <https://cldr.unicode.org>`_ has for them in each language, through `Babel
<https://babel.pocoo.org>`_. A question has the same territory, the same choices and the same order of choices in
every language: only the names differ.

* **One right choice.** Territories with several official languages, or with several currencies, are not asked for
  them, nor are those on two continents for theirs. No wrong choice is a regional official language, or one that 5 %
  of the people speak.
* **Plausible wrong choices.** They are what is right for other territories: of the same sub-region (UN M49) if
  possible, then of the continent, then of the world, in an order drawn by SHA-256. So a choice is wrong about as
  often as it is right elsewhere in the region. No answer is right for more than 30 % of a kind's questions.
* **No name gives it away.** A currency or continent that shares a stem with the territory's name, in any of the
  languages, is no choice. Currencies of one country, which CLDR names after it (*Kenyan Shilling*), are neither
  asked for nor choices: a choice that names another country could be ruled out. An official language may sound like
  its country.
* **Splits by territory,** the same for all kinds and languages: of every sub-region two fifths are train, one fifth
  dev and two fifths test, drawn by SHA-256.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from shifcon_fast.data.cldr_wording import WORDINGS, Wording
from shifcon_fast.data.errors import DataError
from shifcon_fast.extras import needed_for

with needed_for("questions from CLDR"):
    from babel.core import Locale, UnknownLocaleError, get_global
    from babel.numbers import get_territory_currencies

Kind = Literal["language", "currency", "continent"]
Split = Literal["train", "dev", "test"]
KINDS: tuple[Kind, ...] = ("language", "currency", "continent")
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
LANGUAGES = tuple(WORDINGS)
"""Languages that the questions are worded in; others need a ``Wording`` of yours."""

_CHOICES = 4
_LARGEST_SHARE = 0.3
_SPOKEN = 5.0  # percent of the population: such a language could be argued to be right
_OFFICIAL = ("official", "de_facto_official")

# Member states of the United Nations by sub-region (UN M49, as CLDR's territory containment has it), by continent.
_REGIONS = {
    "002": {  # Africa
        "011": "BF BJ CI CV GH GM GN GW LR ML MR NE NG SL SN TG",
        "014": "BI DJ ER ET KE KM MG MU MW MZ RW SC SO SS TZ UG ZM ZW",
        "015": "DZ EG LY MA SD TN",
        "017": "AO CD CF CG CM GA GQ ST TD",
        "018": "BW LS NA SZ ZA",
    },
    "019": {  # the Americas
        "005": "AR BO BR CL CO EC GY PE PY SR UY VE",
        "013": "BZ CR GT HN MX NI PA SV",
        "021": "CA US",
        "029": "AG BB BS CU DM DO GD HT JM KN LC TT VC",
    },
    "142": {  # Asia
        "030": "CN JP KP KR MN",
        "034": "AF BD BT IN IR LK MV NP PK",
        "035": "BN ID KH LA MM MY PH SG TH TL VN",
        "143": "KG KZ TJ TM UZ",
        "145": "AE AM AZ BH CY GE IL IQ JO KW LB OM QA SA SY TR YE",
    },
    "150": {  # Europe
        "039": "AD AL BA ES GR HR IT ME MK MT PT RS SI SM",
        "151": "BG BY CZ HU MD PL RO RU SK UA",
        "154": "DK EE FI GB IE IS LT LV NO SE",
        "155": "AT BE CH DE FR LI LU MC NL",
    },
    "009": {  # Oceania
        "053": "AU NZ",
        "054": "FJ PG SB VU",
        "057": "FM KI MH NR PW",
        "061": "TO TV WS",
    },
}
_TERRITORIES = {
    territory: (continent, region)
    for continent, regions in _REGIONS.items()
    for region, members in regions.items()
    for territory in members.split()
}
_ON_TWO_CONTINENTS = ("AM", "AZ", "CY", "EG", "GE", "KZ", "RU", "TR")
_LANGUAGE_UNCLEAR = ("ME",)  # Montenegrin, which the constitution names, is no language of CLDR's


@dataclass(frozen=True)
class CldrQuestion:
    """A question without words: codes only.

    Attributes:
        row: the same for the same question in every release and language.
        choices: codes of languages (ISO 639), currencies (ISO 4217) or continents (UN M49).
        answer: place of the right one.
    """

    row: int
    kind: Kind
    territory: str
    split: Split
    choices: tuple[str, ...]
    answer: int


def cldr_rows(
    languages: Sequence[str],
    *,
    split: Split | None = None,
    kinds: Sequence[Kind] = KINDS,
    wordings: Mapping[str, Wording] | None = None,
) -> list[dict[str, Any]]:
    """The questions as rows that :func:`shifcon_fast.data.questions.read_questions` reads, all languages in each.

    ``{"row": 3, "group": "language", "territory": "AO", "answer": 2, "en": "Country: Angola\\nOfficial language:",
    "choices": {"en": ["French", ...]}, ...}``. The text ends before the answer, for a base model to go on.

    Args:
        languages: any of ``LANGUAGES``, or of ``wordings``.
        split: one of ``SPLITS``; None takes all.
        kinds: which kinds of question.
        wordings: words for more languages of CLDR's. A question that one language lacks a name for is left out of
            all.

    Raises:
        DataError: a language without wording, an unknown split or kind.
    """
    words = _wordings(languages, wordings)
    return [
        {
            "row": question.row,
            "group": question.kind,
            "territory": question.territory,
            "answer": question.answer,
            **{language: _label_text(question, language, words[language]) for language in languages},
            "choices": {
                language: [_name(question.kind, code, language) for code in question.choices]
                for language in languages
            },
        }
        for question in select_questions(languages, split=split, kinds=kinds)
    ]


def cldr_instructions(
    languages: Sequence[str],
    *,
    split: Split | None = "train",
    kinds: Sequence[Kind] = KINDS,
    wordings: Mapping[str, Wording] | None = None,
) -> list[dict[str, str]]:
    """The same facts as instructions: ``{"lang", "prompt", "response"}``, a whole question and the name.

    Only train on the territories of ``split="train"`` what is to be tested on the others.

    Raises:
        DataError: as :func:`cldr_rows`.
    """
    words = _wordings(languages, wordings)
    return [
        {
            "lang": language,
            "prompt": words[language]
            .questions[question.kind]
            .replace("{country}", _name("territory", question.territory, language)),
            "response": _name(question.kind, question.choices[question.answer], language),
        }
        for question in select_questions(languages, split=split, kinds=kinds)
        for language in languages
    ]


def select_questions(
    languages: Sequence[str], *, split: Split | None = None, kinds: Sequence[Kind] = KINDS
) -> list[CldrQuestion]:
    """The questions that can be put in all of some languages, in the order of their rows.

    Raises:
        DataError: an unknown split or kind, or a language that CLDR does not have.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"split is {split!r}; wanted one of {', '.join(SPLITS)}, or None for all")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise DataError(f"kinds names {', '.join(map(repr, unknown))}; wanted some of {', '.join(KINDS)}")
    asked = [question for kind in kinds for question in _questions(kind) if split in (None, question.split)]
    return [question for question in asked if all(_is_named(question, language) for language in languages)]


def split_of(territory: str) -> Split:
    """Which split a territory (ISO 3166) is in, for all kinds of question."""
    return _splits()[territory]


@lru_cache(maxsize=1)
def _splits() -> Mapping[str, Split]:
    deal: tuple[Split, ...] = ("train", "test", "dev", "train", "test")
    ordered = sorted(_TERRITORIES, key=lambda territory: (_TERRITORIES[territory], _draw("split", territory)))
    return {territory: deal[place % len(deal)] for place, territory in enumerate(ordered)}


@lru_cache(maxsize=len(KINDS))
def _questions(kind: Kind) -> tuple[CldrQuestion, ...]:
    """All questions of a kind, whatever languages they are asked in."""
    right = {territory: answer for territory in _TERRITORIES if (answer := _answer(kind, territory))}
    found = {}
    for territory, answer in right.items():
        wrong = _distractors(kind, territory, right)
        if len(wrong) == _CHOICES - 1 and not _gives_away(kind, answer, territory):
            order = sorted([answer, *wrong], key=lambda code: _draw("order", kind, territory, code))
            found[territory] = (tuple(order), order.index(answer))
    for territory in _too_many({territory: right[territory] for territory in found}):
        del found[territory]
    numbers = {territory: place for place, territory in enumerate(sorted(_TERRITORIES))}
    return tuple(
        CldrQuestion(
            1000 * KINDS.index(kind) + numbers[territory],
            kind,
            territory,
            split_of(territory),
            choices,
            place,
        )
        for territory, (choices, place) in sorted(found.items())
    )


def _answer(kind: Kind, territory: str) -> str | None:
    """The one right answer; None where there are several, or where it is open to argument."""
    if kind == "continent":
        return None if territory in _ON_TWO_CONTINENTS else _TERRITORIES[territory][0]
    if kind == "currency":
        current = get_territory_currencies(territory)
        one = current[0] if len(current) == 1 else None
        return None if one is None or one.startswith(territory) else str(one)  # ISO 4217: KES is Kenya's own
    official = [code for code, status, _ in _spoken(territory) if status in _OFFICIAL]
    return official[0] if len(official) == 1 and territory not in _LANGUAGE_UNCLEAR else None


def _distractors(kind: Kind, territory: str, right: Mapping[str, str]) -> list[str]:
    """Wrong choices: what is right nearby."""
    excluded = {right[territory]}
    if kind == "language":
        excluded |= {code for code, status, share in _spoken(territory) if status or share >= _SPOKEN}
    continent, region = _TERRITORIES[territory]

    def distance(other: str) -> tuple[bool, bool, float]:
        there = _TERRITORIES[other]
        return there[1] != region, there[0] != continent, _draw("wrong", kind, territory, other)

    found: list[str] = []
    for other in sorted(right, key=distance):
        code = right[other]
        if code not in excluded and not _gives_away(kind, code, territory):
            found.append(code)
            excluded.add(code)
        if len(found) == _CHOICES - 1:
            break
    return found


def _too_many(right: Mapping[str, str]) -> list[str]:
    """Territories to leave out so that no answer is right for too many."""
    left = dict(right)
    out: list[str] = []
    while True:
        answer, count = Counter(left.values()).most_common(1)[0]
        if count <= _LARGEST_SHARE * len(left):
            return out
        candidates = [territory for territory, code in left.items() if code == answer]
        out.append(max(candidates, key=lambda territory: _draw("too many", answer, territory)))
        del left[out[-1]]


def _spoken(territory: str) -> list[tuple[str, str | None, float]]:
    """(language, official status, percent of the population), scripts joined."""
    found: dict[str, tuple[str | None, float]] = {}
    for tag, facts in get_global("territory_languages")[territory].items():
        code = tag.partition("_")[0]
        status, share = found.get(code, (None, 0.0))
        found[code] = (status or facts["official_status"], max(share, facts["population_percent"]))
    return [(code, status, share) for code, (status, share) in found.items()]


def _gives_away(kind: Kind, code: str, territory: str) -> bool:
    """Whether a choice shares a stem with the territory's name in any of the languages that have wordings."""
    return kind != "language" and any(
        _stems(_name(kind, code, language)) & _stems(_name("territory", territory, language))
        for language in LANGUAGES
    )


@lru_cache(maxsize=8192)
def _stems(name: str) -> frozenset[str]:
    """What two names that come from each other have in common: the first four letters of a word.

    Where words are not spaced, any run of two Han signs, three kana or four Thai letters. Case and marks do not
    count.
    """
    letters = unicodedata.normalize("NFKD", name.casefold())
    bare = "".join(c if c.isalnum() else " " for c in letters if not unicodedata.combining(c))
    stems = {word[:4] for word in bare.split() if len(word) >= 4}
    for scripts, length in ((("CJK",), 2), (("KATAKANA", "HIRAGANA"), 3), (("THAI",), 4)):
        inside = [unicodedata.name(c, "").startswith(scripts) for c in bare]
        stems |= {
            bare[start : start + length]
            for start in range(len(bare) - length + 1)
            if all(inside[start : start + length])
        }
    return frozenset(stems)


def _label_text(question: CldrQuestion, language: str, words: Wording) -> str:
    country = _name("territory", question.territory, language)
    return f"{words.country}{words.colon}{country}\n{words.labels[question.kind]}{words.colon.rstrip()}"


def _is_named(question: CldrQuestion, language: str) -> bool:
    """Whether CLDR names the territory and all choices in a language, no two of them alike."""
    names = [_names(question.kind, language).get(code) for code in question.choices]
    return (
        question.territory in _names("territory", language)
        and None not in names
        and len(set(names)) == len(names)
    )


def _name(kind: str, code: str, language: str) -> str:
    return _names(kind, language)[code]


@lru_cache(maxsize=1024)
def _names(kind: str, language: str) -> Mapping[str, str]:
    try:
        locale = Locale.parse(language.replace("-", "_"))
    except (ValueError, UnknownLocaleError) as error:
        raise DataError(f"languages names {language!r}, which CLDR does not have: {error}") from error
    table = {"language": "languages", "currency": "currencies"}.get(kind, "territories")
    return {code: unicodedata.normalize("NFC", name) for code, name in getattr(locale, table).items()}


def _wordings(languages: Sequence[str], given: Mapping[str, Wording] | None) -> dict[str, Wording]:
    known = {**WORDINGS, **(given or {})}
    if not languages:
        raise DataError(f"languages is empty; wanted some of {', '.join(known)}")
    if unknown := [language for language in languages if language not in known]:
        raise DataError(
            f"languages names {', '.join(map(repr, unknown))}, for which there is no wording; there is "
            f"{', '.join(known)}. For another language of CLDR's, give `wordings`."
        )
    return known


def _draw(*parts: str) -> float:
    """A number in [0, 1) that is the same for the same words on every machine."""
    digest = hashlib.sha256("\n".join(("shifcon_fast.cldr", *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
