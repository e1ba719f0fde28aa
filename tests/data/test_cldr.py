"""The CLDR questions: one right choice, nothing twice, every language complete, no territory in two splits."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
from babel import Locale
from babel.core import get_global
from babel.numbers import get_territory_currencies

from shifcon_fast.data import cldr
from shifcon_fast.data.cldr import (
    KINDS,
    LANGUAGES,
    SPLITS,
    cldr_instructions,
    cldr_rows,
    select_questions,
    split_of,
)
from shifcon_fast.data.cldr_wording import Wording
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import read_instructions
from shifcon_fast.data.questions import read_questions

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "real_models" / "cldr_questions.py"
ALL = select_questions(LANGUAGES)
ROWS = cldr_rows(LANGUAGES)


def test_every_question_is_there_in_every_language() -> None:
    assert len(LANGUAGES) == 16
    counts = Counter(question.kind for question in ALL)
    assert (counts["language"], counts["currency"], counts["continent"]) == (126, 41, 182)
    questions = read_questions(ROWS)
    assert Counter(q.language for q in questions) == dict.fromkeys(LANGUAGES, len(ALL))
    assert len({(q.row, q.language) for q in questions}) == len(questions)
    assert {q.group for q in questions} == set(KINDS)
    for (
        question
    ) in questions:  # read_questions refuses choices that are alike, and answers that are none of them
        assert len(question.choices) == 4
        assert "{" not in question.text
    for row, question in zip(ROWS, ALL, strict=True):
        assert (row["row"], row["answer"]) == (question.row, question.answer)


def test_a_subset_of_languages_is_the_same_questions() -> None:
    few = cldr_rows(["sw", "en"], kinds=["language"])
    by_row = {row["row"]: row for row in ROWS}
    assert [row["row"] for row in few] == [q.row for q in ALL if q.kind == "language"]
    for row in few:
        assert row["choices"]["sw"] == by_row[row["row"]]["choices"]["sw"]
        assert row["answer"] == by_row[row["row"]]["answer"]


def test_splits_are_by_territory() -> None:
    places = {}
    for split in SPLITS:
        for question in select_questions(LANGUAGES, split=split):
            assert places.setdefault(question.territory, split) == split == split_of(question.territory)
    assert sorted(q.row for split in SPLITS for q in select_questions(LANGUAGES, split=split)) == sorted(
        q.row for q in ALL
    )
    shares = Counter(split_of(territory) for territory in cldr._TERRITORIES)
    assert len(cldr._TERRITORIES) == 193
    assert [shares[split] / 193 for split in SPLITS] == pytest.approx([0.4, 0.2, 0.4], abs=0.01)
    # for ever: whoever trained on the train split must not meet its territories in another release's test split
    listed = " ".join(f"{territory}:{split_of(territory)}" for territory in sorted(cldr._TERRITORIES))
    assert hashlib.sha256(listed.encode()).hexdigest().startswith("1ca6aea71be676ac")


def test_official_languages_are_unambiguous() -> None:
    for question in ALL:
        if question.kind != "language":
            continue
        spoken = get_global("territory_languages")[question.territory]
        right = question.choices[question.answer]
        official = {
            tag.partition("_")[0]
            for tag, facts in spoken.items()
            if facts["official_status"] in cldr._OFFICIAL
        }
        assert official == {right}, question
        for code in set(question.choices) - {right}:
            facts = [found for tag, found in spoken.items() if tag.partition("_")[0] == code]
            assert all(f["official_status"] is None and f["population_percent"] < 5 for f in facts), question


def test_currencies_and_continents_are_unambiguous_and_not_given_away() -> None:
    for question in ALL:
        right = question.choices[question.answer]
        if question.kind == "currency":
            assert get_territory_currencies(question.territory) == [right]
            assert not right.startswith(question.territory)
        if question.kind == "continent":
            zones = get_global("territory_zones").get(question.territory, [])
            named = {zone.partition("/")[0] for zone in zones} & set(ZONES)
            assert not named or right in {ZONES[name] for name in named}, question  # Spain has Ceuta as well
        if question.kind != "language":
            for code in question.choices:
                assert not cldr._gives_away(question.kind, code, question.territory), question
    english = {(row["territory"], row["group"]) for row in ROWS}
    assert ("ZA", "continent") not in english  # South Africa
    assert ("CF", "currency") not in english  # Central African Republic, Central African CFA Franc
    assert ("KE", "currency") not in english  # Kenyan Shilling
    assert not any(
        question.kind == "continent" and question.territory in ("RU", "TR", "EG") for question in ALL
    )


ZONES = {"Africa": "002", "America": "019", "Asia": "142", "Europe": "150"}


@pytest.mark.parametrize(
    ("first", "second", "related"),
    [
        ("Kenyan Shilling", "Kenya", True),
        ("peso mexicano", "México", True),
        ("肯尼亚先令", "肯尼亚", True),
        ("แอฟริกา", "แอฟริกาใต้", True),
        ("Euro", "Europe", True),
        ("米ドル", "エルサルバドル", False),
        ("Euro", "Estonia", False),
        ("US Dollar", "East Timor", False),
    ],
)
def test_stems(first: str, second: str, related: bool) -> None:
    assert bool(cldr._stems(first) & cldr._stems(second)) == related


def test_no_answer_and_no_place_can_be_relied_on() -> None:
    for kind in KINDS:
        asked = [question for question in ALL if question.kind == kind]
        answers = Counter(question.choices[question.answer] for question in asked)
        assert max(answers.values()) <= 0.3 * len(asked)
        places = Counter(question.answer for question in asked)
        assert max(places.values()) <= 0.4 * len(asked)
    # wrong choices come from nearby: nine in ten share the continent with a territory where they are right
    near = [
        any(
            other.choices[other.answer] == code
            for other in ALL
            if other.kind == "language" and same(other, question)
        )
        for question in ALL
        if question.kind == "language"
        for code in question.choices
        if code != question.choices[question.answer]
    ]
    assert sum(near) / len(near) > 0.9


def same(one: cldr.CldrQuestion, other: cldr.CldrQuestion) -> bool:
    return cldr._TERRITORIES[one.territory][0] == cldr._TERRITORIES[other.territory][0]


def test_names_are_cldrs() -> None:
    row = next(
        row
        for row in cldr_rows(["en", "de", "ja"])
        if row["territory"] == "AO" and row["group"] == "language"
    )
    assert row["en"] == "Country: Angola\nOfficial language:"
    assert row["de"] == "Land: Angola\nAmtssprache:"
    assert row["ja"] == f"国：{Locale('ja').territories['AO']}\n公用語："
    assert row["choices"]["de"][row["answer"]] == "Portugiesisch"


def test_instructions_are_of_the_train_territories() -> None:
    rows = cldr_instructions(["en", "fr"])
    train = select_questions(["en", "fr"], split="train")
    assert len(rows) == 2 * len(train)
    assert {
        "lang": "fr",
        "prompt": "Sur quel continent se trouve ce pays : Norvège ?",
        "response": "Europe",
    } in (cldr_instructions(["fr"], split=split_of("NO")))
    assert len(read_instructions(rows)) == len(rows)
    tested = {Locale("en").territories[q.territory] for q in ALL if q.split != "train"}
    asked = {re.search(r": (.*)\?$", row["prompt"])[1] for row in rows if row["lang"] == "en"}  # type: ignore[index]
    assert not tested & asked


def test_another_language_of_cldrs() -> None:
    italian = Wording("Paese", dict.fromkeys(KINDS, "Lingua ufficiale"), dict.fromkeys(KINDS, "{country}?"))
    rows = cldr_rows(["it", "en"], kinds=["language"], wordings={"it": italian})
    assert rows[0]["it"].startswith("Paese: ")
    with pytest.raises(DataError, match="'it', for which there is no wording; there is en, de"):
        cldr_rows(["it"])
    with pytest.raises(DataError, match="'xx', which CLDR does not have"):
        cldr_rows(["xx"], wordings={"xx": italian})
    with pytest.raises(DataError, match="split is 'valid'"):
        cldr_rows(["en"], split="valid")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="kinds names 'capital'"):
        cldr_rows(["en"], kinds=["capital"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="languages is empty"):
        cldr_rows([])


def test_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "q.jsonl"
    arguments = ["--languages", "en,sw", "--split", "dev", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["cldr_questions.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows == cldr_rows(["en", "sw"], split="dev")
    assert capsys.readouterr().out == f"{output}: {len(rows)} rows\n"
    assert len(read_questions(output)) == 2 * len(rows)
    monkeypatch.setattr(sys, "argv", ["x", "--languages", "en,xx", "--instructions", "--output", str(output)])
    with pytest.raises(SystemExit, match="'xx', for which there is no wording"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
