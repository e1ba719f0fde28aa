"""Language codes: the one place that knows that ``swh_Latn``, ``swh`` and ``sw`` are the same language.

Codes are shown, stored and used as keys exactly as the user wrote them. They are *compared* here, on `langcodes
<https://pypi.org/project/langcodes/>`_ (IANA's registry, ISO 639, CLDR's likely subtags and language matching):
FLORES (``swh_Latn``), ISO 639-3 (``deu``), BCP 47 (``pt-BR``, ``zh-Hans``) and the same with underscores. A script
or region that a code leaves out is the likely one: ``zh`` is ``zh-Hans``, ``pt`` is ``pt-BR``, and neither is
``zh-Hant`` or ``pt-PT``.

A name that is no code (``swahili``) is allowed wherever the user gives it, and is equal to itself only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from langcodes import Language, standardize_tag, tag_distance, tag_is_valid
from langcodes.tag_parser import LanguageTagError

from shifcon_fast.data.errors import DataError

_SAME = 1  # CLDR's distance: 0 is the same locale, 1 is Norwegian as `no` and as `nb`, from 4 on they differ
_NO_REGION = re.compile(r"[-_](?:XX|ZZ)$")  # mBART's en_XX
_FIELD = re.compile(
    r"(?P<language>[a-z]{2,3})(?:[-_](?P<script>[A-Z][a-z]{3}))?(?:[-_](?P<region>[A-Z]{2}|[0-9]{3}))?"
)

# Three-letter codes that are also words or abbreviations that people call a field. In a file that writes its
# other languages with three letters they are languages; beside a two-letter code they are taken for the word.
_AMBIGUOUS = """
    aka arm ave bis cat chi cor cos div est fin geo hat her ice ind kin lat lim lin lit mac mal mar may
    mon nav nor ori pan per pol que rum run sag sin sun tel ton ven vol wel
"""
_WORDS = ("src", "fat", "in")  # codes, too, but never what a field of that name holds
# Without a two-letter form: CLDR's locales and FLORES-200's languages, but for those that are words as well
# (min, mag, sat, sid, tok, vec, war …), which are to be listed, or written as FLORES does (min_Latn).
_THREE_LETTERS = """
    ace acm acq ady aeb agq ajp apc apd arn ars ary arz asa ast awa azb bem bew bez bho bjn brx ccp ceb
    cgg chr cjk ckb crh dav dje doi dsb dua dyo dyu ebu ewo fil fon frr fur fuv gaa gez gsw guz haw hil
    hmn hne hrx hsb ilo jam kaa kab kac kam kbp kcg kea kgp khq kln kmb kok kpe ksf ksh lij lld lmo ltg
    lua luo lus luy mai mdf mer mfe mni moh mos mwl myv mzn nap nds nnh nqo nso nus nyn pag pap pbt pcm
    pms prg prs quc quy rhg rwk sah saq sbp scn sdh seh ses shi shn skr sma smj smn sms syr szl taq teo
    tet tgl tpi trv tum twq tyv tzm umb vai vmw vun wae wbp xog yrl yue zgh
"""


def is_code(name: str) -> bool:
    """Whether a name is a language code that is assigned, in any of the forms."""
    return _standard(name) is not None


def primary_code(name: str) -> str:
    """The bare language, ISO 639-1 where there is such a code: ``sw`` for ``swh_Latn``, ``zh`` for ``zh-Hant``.

    What tables that go by language (number formats, language identification) are asked with. A name that is no
    code is returned as it is.
    """
    standard = _standard(name)
    return name if standard is None else str(Language.get(standard).language)


def script_of(name: str, *, likely: bool = True) -> str | None:
    """ISO 15924 code of the script (``Latn``) that a code names or else, if asked for, the likely one; or None."""
    standard = _standard(name)
    if standard is None:
        return None
    language = Language.get(standard)
    script = language.maximize().script if likely else language.script
    return None if script is None else str(script)


def is_same_language(first: str, second: str) -> bool:
    """Whether two names mean the same language, script and region, whatever the form they are written in."""
    if first == second:
        return True
    one, other = _standard(first), _standard(second)
    return one is not None and other is not None and tag_distance(one, other) <= _SAME


def find_language(name: str, known: Iterable[str]) -> str | None:
    """The spelling of ``known`` that means the language ``name``; None where there is none.

    Raises:
        DataError: ``name`` is not among them as it is written, and two others mean it.
    """
    return _find(name, tuple(known))


@lru_cache(maxsize=4096)
def _find(name: str, known: tuple[str, ...]) -> str | None:
    if name in known:
        return name
    found = [each for each in known if is_same_language(name, each)]
    if len(found) > 1:  # pt-BR rather than pt, for por-BR
        found = [each for each in found if _region(each) == _region(name)] or found
    if len(found) > 1:
        raise DataError(
            f"language {name!r}: {' and '.join(map(repr, found))} both mean it; write the one that is "
            "wanted as it is written there"
        )
    return found[0] if found else None


def position_of(name: str, known: Sequence[str]) -> int:
    """Position in ``known`` of the language ``name``, in whatever form (``swh_Latn`` for ``sw``).

    Raises:
        ValueError: a language that is not among them; they are listed.
    """
    found = find_language(name, known)
    if found is None:
        near = nearest(name, known)
        advice = f"; if {near[0]!r} is meant, write that" if near else ""
        raise ValueError(f"language: got {name!r}; wanted one of {', '.join(known)}{advice}")
    return list(known).index(found)


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Spellings of ``known`` that share the bare language with ``name`` (``pt`` for ``pt-PT``), for advice."""
    return [each for each in known if is_code(each) and primary_code(each) == primary_code(name)]


def refuse_repeated(names: Sequence[str], where: str) -> None:
    """Raise DataError where two names mean the same language.

    ``pt`` beside ``pt-BR`` is let pass, and so is Akan beside Twi, as FLORES has them: somebody tells them apart.
    """
    for position, name in enumerate(names):
        for earlier in names[:position]:
            same = is_same_language(earlier, name) and primary_code(earlier) == primary_code(name)
            if same and _region(earlier) == _region(name):
                raise DataError(
                    f"{where}: {earlier!r} and {name!r} are the same language; wanted one of them: choose with "
                    "`languages` (--languages)"
                )


def field_kind(name: str) -> str:
    """What the name of a data field says: "language", "ambiguous" (a word as well) or "no language".

    Stricter than :func:`is_code`, since most short words are the code of some language: the letters must have the
    usual case, and a bare three-letter code must be in common use.
    """
    match = _FIELD.fullmatch(name)
    standard = _standard(name)
    if match is None or standard is None or match["language"] in _WORDS:
        return "no language"
    if match["script"] or len(match["language"]) == 2:
        return "language"
    if match["language"] in _AMBIGUOUS.split():
        return "language" if match["region"] else "ambiguous"
    short = len(primary_code(name)) == 2
    return "language" if short or match["language"] in _THREE_LETTERS.split() else "no language"


@lru_cache(maxsize=4096)
def _standard(name: str) -> str | None:
    """The standard form of a code, folded into the macrolanguage that stands for it; None if it is no code."""
    try:
        bare = _NO_REGION.sub("", name)
        if not tag_is_valid(bare):
            return None
        standard = standardize_tag(bare)
        if len(Language.get(standard).language or "") != 2:  # so that Twi stays Twi, and is not Akan
            standard = standardize_tag(bare, macro=True)
        return standard if Language.get(standard).language else None
    except LanguageTagError:
        return None


def _region(name: str) -> str | None:
    standard = _standard(name)
    return None if standard is None else Language.get(standard).territory
