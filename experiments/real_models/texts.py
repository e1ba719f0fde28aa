"""The text of all runs: what they are trained on, and what they are measured with."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from arms import (
    FLORES_ROWS,
    LANGUAGES,
    PIVOT,
    PLAIN,
    SPACE_ROWS,
    TRANSLATION_ROWS,
    TRANSLATIONS,
    WEAK,
    made_of,
)
from stored import questions

from shifcon_fast.data.cldr import cldr_instructions
from shifcon_fast.data.parallel import read_parallel

_TRANSLATE = {
    "en": "Translate into English", "de": "Translate into German", "fr": "Translate into French",
    "sw": "Translate into Swahili", "tr": "Translate into Turkish", "hi": "Translate into Hindi",
    "id": "Translate into Indonesian",
}  # fmt: skip


def instructions(arm: str, data: Path) -> list[dict[str, str]]:
    """The facts of the train territories; for some as many translation tasks besides."""
    facts = cldr_instructions(LANGUAGES, split="train")
    if not made_of(arm).with_translations:
        return facts
    text = translations(data)
    tasks = []
    for place in range(len(facts)):
        code, row = WEAK[place % len(WEAK)], place % TRANSLATIONS
        source, target = (code, PIVOT) if (place // len(WEAK)) % 2 else (PIVOT, code)
        prompt = f"{_TRANSLATE[target]}: {text[source][row]}"
        tasks.append({"lang": target, "prompt": prompt, "response": text[target][row]})
    return [row for pair in zip(facts, tasks, strict=True) for row in pair]


def prompts() -> dict[str, list[str]]:
    """Those of the train territories' facts: the same questions in every language, in the same order."""
    facts = cldr_instructions(LANGUAGES, split="train")
    return {code: [row["prompt"] for row in facts if row["lang"] == code] for code in LANGUAGES}


def translations(data: Path) -> dict[str, list[str]]:
    """The rows whose sentence is shortest in the pivot, in the order of the data."""
    text = _rows(data / "ntrex128.jsonl", TRANSLATION_ROWS)
    order = sorted(range(len(TRANSLATION_ROWS)), key=lambda row: len(text[PIVOT][row]))
    kept = sorted(order[:TRANSLATIONS])
    return {code: [rows[row] for row in kept] for code, rows in text.items()}


def news(data: Path) -> dict[str, list[str]]:
    """That of the language spaces."""
    return _rows(data / "ntrex128.jsonl", SPACE_ROWS)


def sentences(data: Path) -> dict[str, list[str]]:
    """Those that perplexity, retrieval and continuations are measured on; nothing is trained on them."""
    return _rows(data / "flores200_devtest.jsonl", FLORES_ROWS)


@cache
def digest(data: Path) -> str:
    """SHA-256 of all of it: arms of one experiment have the same."""
    asked = [[[each.text, each.choices] for each in questions(split)] for split in ("dev", "test")]
    held = [instructions(PLAIN, data), translations(data), news(data), sentences(data), asked]
    return hashlib.sha256(json.dumps(held, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _rows(path: Path, rows: range) -> dict[str, list[str]]:
    return {
        code: text[rows.start : rows.stop] for code, text in read_parallel(path, languages=LANGUAGES).items()
    }
