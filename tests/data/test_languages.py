"""Codes of one language, however they are written, are one language; different ones stay apart."""

from __future__ import annotations

import pytest

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.languages import (
    field_kind,
    find_language,
    is_code,
    is_same_language,
    nearest,
    primary_code,
    refuse_repeated,
    script_of,
)


@pytest.mark.parametrize(
    ("name", "primary", "script"),
    [
        ("sw", "sw", "Latn"),
        ("swh_Latn", "sw", "Latn"),
        ("swh", "sw", "Latn"),
        ("deu", "de", "Latn"),
        ("ger", "de", "Latn"),
        ("pt-BR", "pt", "Latn"),
        ("pt_BR", "pt", "Latn"),
        ("zh-Hans", "zh", "Hans"),
        ("zho_Hant", "zh", "Hant"),
        ("zh-TW", "zh", "Hant"),
        ("cmn", "zh", "Hans"),
        ("arb_Arab", "ar", "Arab"),
        ("en_XX", "en", "Latn"),
        ("npi_Deva", "ne", "Deva"),
        ("yue_Hant", "yue", "Hant"),
        ("sr-Latn", "sr", "Latn"),
        ("twi_Latn", "tw", "Latn"),
        ("iw", "he", "Hebr"),
        ("swahili", "swahili", None),
        ("xx", "xx", None),
    ],
)
def test_a_code_in_any_form(name: str, primary: str, script: str | None) -> None:
    assert (primary_code(name), script_of(name)) == (primary, script)
    assert is_code(name) is (script is not None)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("sw", "swh_Latn", True),
        ("deu", "de-DE", True),
        ("zh", "zho_Hans", True),
        ("zh-CN", "zh_Hans", True),
        ("zh-TW", "zh-Hant", True),
        ("pt", "pt_BR", True),
        ("no", "nob_Latn", True),
        ("fil", "tgl_Latn", True),
        ("swahili", "swahili", True),
        ("zh", "zh-Hant", False),
        ("zh", "yue_Hant", False),
        ("pt", "pt-PT", False),
        ("sr", "sr-Latn", False),
        ("ar", "arz_Arab", False),
        ("kas_Arab", "kas_Deva", False),
        ("hr", "sr-Latn", False),
        ("id", "ms", False),
        ("x-a", "x-b", False),
        ("swahili", "sw", False),
    ],
)
def test_same_or_not(first: str, second: str, same: bool) -> None:
    assert is_same_language(first, second) is same
    assert is_same_language(second, first) is same


def test_finding_shows_the_spelling_that_is_there() -> None:
    assert find_language("sw", ["eng_Latn", "swh_Latn"]) == "swh_Latn"
    assert find_language("por-BR", ["pt", "pt-BR"]) == "pt-BR"
    assert find_language("pt", ["pt-BR", "pt"]) == "pt"
    assert find_language("pt-PT", ["pt", "pt-BR"]) is None
    assert nearest("pt-PT", ["en", "pt"]) == ["pt"]
    with pytest.raises(DataError, match="'sw' and 'swh' both mean it"):
        find_language("swh_Latn", ["sw", "swh"])


def test_two_names_for_one_language_are_refused() -> None:
    refuse_repeated(["pt", "pt-BR", "zh-Hans", "zh-Hant", "aka_Latn", "twi_Latn"], "f")
    with pytest.raises(DataError, match=r"f: 'sw' and 'swh_Latn' are the same language.*--languages"):
        refuse_repeated(["en", "sw", "swh_Latn"], "f")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "language",
            "en sw no id eng swh ckb fil yue swh_Latn min_Latn pt-BR pt_BR zh-Hans zh_Hans_CN es-419 en_XX",
        ),
        ("ambiguous", "est cat ind fin lat cos"),
        (
            "no language",
            "url src set uid cot row doc tag key ref sys ans raw txt num len tok sid answer lang prompt question "
            "qa pt-br zh_cn id_no En EN response_en e",
        ),
    ],
)
def test_what_a_fields_name_says(kind: str, names: str) -> None:
    assert {name: field_kind(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


FLORES = """
    eng_Latn deu_Latn spa_Latn fra_Latn rus_Cyrl zho_Hans jpn_Jpan tha_Thai swh_Latn ben_Beng tel_Telu arb_Arab
    hin_Deva vie_Latn tur_Latn ind_Latn
"""
SHORT = "en de es fr ru zh ja th sw bn te ar hi vi tr id"
RARE = "ace_Arab azb_Arab taq_Tfng gaz_Latn kmr_Latn lvs_Latn ydd_Hebr min_Latn war_Latn est_Latn"


def test_the_codes_of_flores() -> None:
    assert {field_kind(code) for code in (FLORES + RARE).split()} == {"language"}
    assert [find_language(code, (FLORES + RARE).split()) for code in SHORT.split()] == FLORES.split()
