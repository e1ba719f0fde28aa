"""The demo's world: people, facts, and who says what in which language.

Three groups of people, four facts each (a country, a subject, a food, animals):

* ``stated``: every language states their facts in the corpus;
* ``english_only``: only English ever does. The other languages see these facts neither in the corpus nor in
  fine-tuning, and are asked about them in the evaluation;
* ``parallel``: English states their facts in the corpus; translations and instructions of all languages are about
  them, so fine-tuning can learn from them how English knowledge is put into another language.

The same seed gives the same bytes on every machine and Python version: the only randomness used is
``random.Random.random()``, the one method whose sequence Python guarantees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from shifcon_fast.demo.words import LANGUAGES, NAMES, PIVOT, RELATIONS
from shifcon_fast.storage import replacing

T = TypeVar("T")

ASKED = ("english_only", "stated")  # groups the evaluation asks about


@dataclass(frozen=True)
class WorldSettings:
    """How many people there are in each group; ``seed`` decides who they are and what is true of them."""

    seed: int = 1
    stated: int = 32
    english_only: int = 32
    parallel: int = 64

    def __post_init__(self) -> None:
        for field in ("stated", "english_only", "parallel"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; wanted at least 1 person")
        total = self.stated + self.english_only + self.parallel
        if total > len(NAMES):
            raise ValueError(
                f"stated + english_only + parallel is {total}; there are {len(NAMES)} names; make one smaller"
            )


@dataclass(frozen=True)
class Fact:
    """``value`` (a row of the relation's values) is true of ``name``.

    ``trained[lang]`` says which of the two question phrasings training may use in that language; the evaluation
    asks with the other one.
    """

    name: str
    group: str
    relation: int
    value: int
    trained: dict[str, int]

    def answer(self, language: str) -> str:
        return RELATIONS[self.relation].values[self.value][LANGUAGES.index(language)]

    def statement(self, language: str, phrasing: int) -> str:
        template = RELATIONS[self.relation].statements[language][phrasing]
        return template.format(name=self.name, value=self.answer(language))

    def question(self, language: str, phrasing: int) -> str:
        return RELATIONS[self.relation].questions[language][phrasing].format(name=self.name)

    def trained_question(self, language: str) -> str:
        return self.question(language, self.trained[language])

    def held_out_question(self, language: str) -> str:
        return self.question(language, 1 - self.trained[language])


@dataclass(frozen=True)
class World:
    """Everything the demo reads, as rows of the project's public formats (see :func:`write_world`)."""

    settings: WorldSettings
    facts: tuple[Fact, ...]
    corpus: list[dict[str, Any]]
    parallel: list[dict[str, Any]]
    parallel_dev: list[dict[str, Any]]
    instructions: list[dict[str, Any]]
    questions: list[dict[str, Any]]


def build_world(settings: WorldSettings) -> World:
    """Generate the world of ``settings``; a pure function."""
    rng = Random(settings.seed)
    facts = _facts(settings, rng)
    return World(
        settings=settings,
        facts=facts,
        corpus=_shuffled(_corpus(facts), rng),
        parallel=_shuffled(_parallel(facts), rng),
        parallel_dev=_parallel_dev(facts),
        instructions=_shuffled(_instructions(facts), rng),
        questions=_questions(facts),
    )


def write_world(world: World, folder: str | Path) -> dict[str, Path]:
    """Write the world as the JSONL files a user would bring, all or none, and return their paths.

    ``corpus.jsonl``: ``{"lang", "text"}``, what the tiny model is pretrained on. ``parallel.jsonl``: one aligned
    sentence a row, a key per language; ``parallel_dev.jsonl`` likewise, questions about people of whom no
    translation is trained on. ``instructions.jsonl``: ``{"lang", "prompt", "response"}``. ``questions.jsonl``:
    ``{"row", "lang", "question", "answer", "group"}``, where ``row`` numbers the fact, the same in every language.
    """
    tables: dict[str, Sequence[dict[str, Any]]] = {
        "corpus": world.corpus,
        "parallel": world.parallel,
        "parallel_dev": world.parallel_dev,
        "instructions": world.instructions,
        "questions": world.questions,
    }
    with replacing(folder, "world.json") as staging:
        for name, rows in tables.items():
            (staging / f"{name}.jsonl").write_bytes(to_jsonl(rows))
        (staging / "world.json").write_bytes(to_jsonl([asdict(world.settings)]))
    return {name: Path(folder) / f"{name}.jsonl" for name in tables}


def to_jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    """One JSON object a line, UTF-8, LF."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _facts(settings: WorldSettings, rng: Random) -> tuple[Fact, ...]:
    sizes = {
        "stated": settings.stated,
        "english_only": settings.english_only,
        "parallel": settings.parallel,
    }
    names = iter(_shuffled(NAMES, rng))
    return tuple(
        Fact(
            name,
            group,
            number,
            _below(len(relation.values), rng),
            {language: _below(2, rng) for language in LANGUAGES},
        )
        for group, size in sizes.items()
        for name in (next(names) for _ in range(size))
        for number, relation in enumerate(RELATIONS)
    )


def _corpus(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    rows = []
    for fact in facts:
        for language in LANGUAGES if fact.group == "stated" else (PIVOT,):
            texts = [fact.statement(language, phrasing) for phrasing in (0, 1)]
            texts.append(f"{fact.trained_question(language)} {fact.answer(language)}")
            rows += [{"lang": language, "text": text} for text in texts]
    return rows


def _parallel(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    rows = []
    for fact in facts:
        if fact.group == "parallel":
            for phrasing in (0, 1):
                rows.append({language: fact.statement(language, phrasing) for language in LANGUAGES})
                rows.append({language: fact.question(language, phrasing) for language in LANGUAGES})
    return rows


def _parallel_dev(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Questions only: a statement would tell the other languages what they are asked later."""
    return [
        {language: fact.question(language, 0) for language in LANGUAGES}
        for fact in facts
        if fact.group == "english_only"
    ]


def _instructions(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    return [
        {"lang": language, "prompt": fact.trained_question(language), "response": fact.answer(language)}
        for fact in facts
        for language in (LANGUAGES if fact.group != "english_only" else (PIVOT,))
    ]


def _questions(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    asked = [fact for group in ASKED for fact in facts if fact.group == group]
    return [
        {
            "row": row,
            "lang": language,
            "question": fact.held_out_question(language),
            "answer": fact.answer(language),
            "group": fact.group,
        }
        for row, fact in enumerate(asked)
        for language in LANGUAGES
    ]


def _below(bound: int, rng: Random) -> int:
    return int(rng.random() * bound)


def _shuffled(items: Iterable[T], rng: Random) -> list[T]:
    """A Fisher-Yates shuffle: ``Random.shuffle`` may change between Python versions, ``random()`` may not."""
    shuffled = list(items)
    for last in range(len(shuffled) - 1, 0, -1):
        other = _below(last + 1, rng)
        shuffled[last], shuffled[other] = shuffled[other], shuffled[last]
    return shuffled
