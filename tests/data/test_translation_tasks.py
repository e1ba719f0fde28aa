"""Translations as instructions: shares by temperature, directions, gaps, draws."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.translation_tasks import translation_instructions

TEXT = {
    "en": [f"sentence {index}" for index in range(12)],
    "sw": [f"sentensi {index}" for index in range(12)],
    "deu_Latn": [f"Satz {index}" for index in range(12)],
}


@pytest.fixture
def gaps(tmp_path: Path) -> Path:
    """16 rows in English and Swahili, of which four are in German too."""
    rows = [
        {"en": f"sentence {i}", "sw": f"sentensi {i}", **({"de": f"Satz {i}"} if i % 4 == 0 else {})}
        for i in range(16)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_tasks_are_the_pairs_both_ways() -> None:
    tasks = translation_instructions(TEXT, 48)
    assert tasks == translation_instructions(TEXT, 48)
    assert tasks != translation_instructions(TEXT, 48, seed=1)
    drawn = Counter()
    for task in tasks:
        prompt, response = (turn.content for turn in task.turns)
        order, source = prompt.split(": ")
        assert source.split()[1] == response.split()[1]  # the same row
        words = (source.split()[0], response.split()[0], order, task.language)
        drawn[words] += 1
    assert drawn == {
        ("sentensi", "sentence", "Translate into English", "en"): 12,
        ("sentence", "sentensi", "Translate into Swahili", "sw"): 12,
        ("Satz", "sentence", "Translate into English", "en"): 12,
        ("sentence", "Satz", "Translate into German", "deu_Latn"): 12,
    }
    assert {task.language for task in translation_instructions(TEXT, 6, directions="to_pivot")} == {"en"}
    assert "en" not in {task.language for task in translation_instructions(TEXT, 6, directions="from_pivot")}


@pytest.mark.parametrize(
    ("temperature", "german"), [(1.0, 20), (2.0, 33), (1e9, 50), (0.5, 6)]
)  # n^(1/T): 4 of 20, 2 of 6, half, 16 of 272
def test_temperature_evens_out_languages(gaps: Path, temperature: float, german: int) -> None:
    tasks = translation_instructions(
        gaps, 100, temperature=temperature, allow_missing=True, directions="from_pivot"
    )
    counts = Counter(task.language for task in tasks)
    assert counts == {"de": german, "sw": 100 - german}
    rows = Counter(task.turns[1].content for task in tasks)
    of_german = [rows[f"Satz {index}"] for index in (0, 4, 8, 12)]
    assert max(of_german) - min(of_german) <= 1  # no row again before all were drawn


def test_what_cannot_be_is_refused(gaps: Path) -> None:
    for settings, message in (
        ({"count": 0}, "count: got 0"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"directions": "up"}, "directions: got 'up'; wanted one of both"),
        ({"pivot": "xx"}, "pivot: got 'xx'"),
    ):
        with pytest.raises(ValueError, match=message):
            translation_instructions(TEXT, **{"count": 4, **settings})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="only the pivot"):
        translation_instructions({"en": TEXT["en"]}, 4)
    with pytest.raises(DataError, match="a language is missing"):
        translation_instructions(gaps, 4)
