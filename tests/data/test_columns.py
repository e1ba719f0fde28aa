"""Which fields become languages when nobody says so, and that it is said."""

from __future__ import annotations

import logging

import pytest

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.data.questions import read_questions


def languages(**fields: object) -> list[str]:
    return list(read_parallel([fields, fields]))


@pytest.mark.parametrize(
    "field",
    [
        "url",
        "src",
        "set",
        "uid",
        "cot",
        "row",
        "doc",
        "answer",
        "tag",
        "ref",
        "est",
        "cat",
        "ind",
        "EN",
        "pt-br",
    ],
)
def test_words_are_no_languages(field: str) -> None:
    assert languages(en="a word", sw="neno moja", **{field: "some text"}) == ["en", "sw"]


@pytest.mark.parametrize(
    "field", ["swh_Latn", "swh", "deu", "pt-BR", "pt_BR", "zh-Hans", "fil", "ckb_Arab", "est_Latn"]
)
def test_codes_of_every_form_are_languages(field: str) -> None:
    assert languages(**{"en": "a word", field: "some text"}) == ["en", field]


def test_words_are_languages_among_three_letters() -> None:
    assert languages(eng="a word", est="üks sõna", cat="un mot", src="a b") == ["eng", "est", "cat"]


def test_the_values_decide_too() -> None:
    assert languages(en="a word", id="satu kata") == ["en", "id"]
    for value in (7, "7", "dev-0007", "3f9ac01b", "https://example.org/a b".replace(" ", "")):
        assert languages(en="a word", id=value, no=value) == ["en"]
    assert languages(en="a word", zh="他有5个苹果") == ["en", "zh"]  # no space and a digit, but no identifier


def test_what_was_taken_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    languages(en="a word", sw="neno moja", row=1)
    assert [record.getMessage() for record in caplog.records] == [
        "the given rows: languages en, sw; other fields, left out: row"
    ]
    assert caplog.records[0].levelno == logging.INFO
    caplog.clear()
    languages(en="a word", src="a word", answer=3)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "If src are languages too, list all languages in `languages` (--languages)" in caplog.text


def test_one_language_under_two_names_is_refused() -> None:
    with pytest.raises(DataError, match="'sw' and 'swh_Latn' are the same language"):
        languages(en="a", sw="b", swh_Latn="c")
    rows = [{"en": "a", "sw": "b", "swh_Latn": "c"}] * 2
    assert list(read_parallel(rows, languages=["en", "sw"])) == ["en", "sw"]
    with pytest.raises(DataError, match="languages: 'sw' and 'swh_Latn' are the same language"):
        read_parallel(rows, languages=["en", "sw", "swh_Latn"])


def test_languages_are_found_however_they_are_written_and_named_as_asked() -> None:
    rows = [{"eng_Latn": "a", "zho_Hant": "b"}, {"eng_Latn": "c", "zho_Hant": "d"}]
    assert read_parallel(rows, languages=["zh-TW", "en"]) == {"zh-TW": ["b", "d"], "en": ["a", "c"]}
    with pytest.raises(DataError, match="no row has 'zh'; found eng_Latn, zho_Hant; if 'zho_Hant' is meant"):
        read_parallel(rows, languages=["en", "zh"])
    assert list(
        read_parallel([{"English": "a", "Kiswahili": "b"}] * 2, languages=["English", "Kiswahili"])
    ) == [
        "English",
        "Kiswahili",
    ]


def test_questions_are_selected_by_any_form() -> None:
    rows = [{"answer": 1, "en": "How many?", "zh-Hans": "多少?", "src": "x y"}]
    assert [question.language for question in read_questions(rows)] == ["en", "zh-Hans"]
    assert [question.language for question in read_questions(rows, languages=["zh"])] == ["zh"]
    single = [{"lang": "swh_Latn", "question": "Wapi?", "answer": "Nairobi"}]
    assert [question.language for question in read_questions(single, languages=["sw"])] == ["sw"]


@pytest.mark.parametrize("gap", ["", "  \n", "\u200b", "\ufeff \u00ad", "\u3164", None, float("nan")])
def test_gaps(gap: object) -> None:
    rows = [{"en": "a", "sw": "b"}, {"en": "c", "sw": gap}, {"en": "e", "sw": "f"}]
    assert read_parallel(rows, allow_missing=True) == {"en": ["a", "e"], "sw": ["b", "f"]}
    with pytest.raises(DataError, match=r"row 1 \(from 0\) of the given rows.*'sw'") as refused:
        read_parallel(rows)
    assert "'sw'" in str(refused.value)
    with pytest.raises(DataError, match=r"sentence 1 \(from 0\) of the given mapping.*'sw'"):
        read_parallel({"en": ["a", "c"], "sw": ["b", gap]})
    asked = [{"answer": 1, "en": "a?", "sw": gap}, {"answer": 2, "en": "b?", "sw": "c?"}]
    found = read_questions(asked, allow_missing=True)
    assert [(question.row, question.language) for question in found] == [(0, "en"), (1, "en"), (1, "sw")]
