"""The generated world: the same everywhere, right by construction, and nothing leaks to the weak languages."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import combinations

import pytest

from shifcon_fast.data.instructions import read_instructions
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.data.questions import read_questions
from shifcon_fast.demo.words import LANGUAGES, NAMES, RELATIONS
from shifcon_fast.demo.world import World, WorldSettings, build_world, to_jsonl, write_world

WEAK = LANGUAGES[1:]

# SHA-256 of the five tables of a small world: a change here makes every published demo result another's.
GOLDEN = ["b70d59af68e79a39", "dd5c3015b01e05b8", "12d7c20ac013b8ad", "a7b72171330bc491", "27394e1db8bbf0b0"]


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(WorldSettings(seed=5))


def words(text: str) -> list[str]:
    return re.sub(r"([.?])", r" \1", text).split()


def texts_in(world: World, language: str) -> list[str]:
    """Everything a model can read in a language before and during fine-tuning."""
    corpus = [row["text"] for row in world.corpus if row["lang"] == language]
    parallel = [row[language] for row in [*world.parallel, *world.parallel_dev]]
    asked = [f"{row['prompt']} {row['response']}" for row in world.instructions if row["lang"] == language]
    return [*corpus, *parallel, *asked]


def vocabulary(language: str) -> set[str]:
    column = LANGUAGES.index(language)
    templates = [
        text.format(name="", value="")
        for relation in RELATIONS
        for text in (*relation.statements[language], *relation.questions[language])
    ]
    found = {word for text in templates for word in words(text)} - {".", "?"}
    return found | {row[column] for relation in RELATIONS for row in relation.values}


def test_the_same_seed_gives_the_same_bytes_on_every_machine() -> None:
    world = build_world(WorldSettings(seed=1, stated=3, english_only=3, parallel=4))
    tables = (world.corpus, world.parallel, world.parallel_dev, world.instructions, world.questions)
    digests = [hashlib.sha256(to_jsonl(rows)).hexdigest()[:16] for rows in tables]
    assert digests == GOLDEN


def test_another_seed_is_another_world() -> None:
    first, second = (build_world(WorldSettings(seed=seed)) for seed in (1, 2))
    same = sum(
        a.name == b.name and a.value == b.value for a, b in zip(first.facts, second.facts, strict=True)
    )
    assert same < len(first.facts) / 50


def test_names_are_distinct_and_no_word_belongs_to_two_languages() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for a, b in combinations(LANGUAGES, 2):
        assert vocabulary(a).isdisjoint(vocabulary(b))
    for language in LANGUAGES:
        assert vocabulary(language).isdisjoint(NAMES)
        values = [row[LANGUAGES.index(language)] for relation in RELATIONS for row in relation.values]
        assert len(set(values)) == len(values)
        assert all(len(words(value)) == 1 for value in values)


def test_every_answer_is_what_the_english_corpus_states(world: World) -> None:
    """The corpus is read back: from its sentences alone, every question gets the answer it is given."""
    stated: dict[tuple[str, str], str] = {}
    for row in world.corpus:
        if row["lang"] != "en":
            continue
        for relation in RELATIONS:
            for template in relation.statements["en"]:
                pattern = (
                    re.escape(template).replace(r"\{name\}", "(?P<n>.+)").replace(r"\{value\}", "(?P<v>.+)")
                )
                if match := re.fullmatch(pattern, row["text"]):
                    assert stated.setdefault((match["n"], relation.name), match["v"]) == match["v"]
    assert len(stated) == len(world.facts)
    for row in world.questions:
        column = LANGUAGES.index(row["lang"])
        (name,) = set(words(row["question"])) & set(NAMES)
        (relation,) = [
            each
            for each in RELATIONS
            if row["question"] in [q.format(name=name) for q in each.questions[row["lang"]]]
        ]
        (answer,) = [values[column] for values in relation.values if values[0] == stated[name, relation.name]]
        assert row["answer"] == answer


def test_weak_languages_never_hold_a_name_and_a_value_of_what_only_english_states(world: World) -> None:
    secret = {fact.name for fact in world.facts if fact.group == "english_only"}
    assert len(secret) == world.settings.english_only
    for language in WEAK:
        values = {row[LANGUAGES.index(language)] for relation in RELATIONS for row in relation.values}
        about_them = [set(words(text)) for text in texts_in(world, language) if secret & set(words(text))]
        assert about_them  # their questions are in parallel_dev, so the check below has something to find
        assert not any(values & tokens for tokens in about_them)
    for row in world.corpus + world.instructions:
        if row["lang"] != "en":
            assert secret.isdisjoint(words(row.get("text") or row["prompt"]))


def test_people_of_one_group_are_in_no_other(world: World) -> None:
    groups = {
        group: {fact.name for fact in world.facts if fact.group == group}
        for group in ("stated", "english_only", "parallel")
    }
    for a, b in combinations(groups.values(), 2):
        assert a.isdisjoint(b)
    spoken_of = {
        name for row in world.parallel for text in row.values() for name in set(words(text)) & set(NAMES)
    }
    assert spoken_of == groups["parallel"]


def test_no_evaluated_question_is_trained_on_in_its_language(world: World) -> None:
    asked = {(row["lang"], row["question"]) for row in world.questions}
    trained = {(row["lang"], row["prompt"]) for row in world.instructions}
    corpus = {
        (row["lang"], row["text"].partition("?")[0] + "?") for row in world.corpus if "?" in row["text"]
    }
    assert len(asked) == 2 * 32 * 4 * 4
    assert corpus
    assert asked.isdisjoint(trained | corpus)


def test_english_dominates_the_corpus(world: World) -> None:
    counts = {code: sum(row["lang"] == code for row in world.corpus) for code in LANGUAGES}
    assert all(counts["en"] == 4 * counts[code] for code in WEAK)


def test_the_files_are_in_the_public_formats(world: World, tmp_path) -> None:
    files = write_world(world, tmp_path)
    parallel = read_parallel(files["parallel"])
    assert list(parallel) == list(LANGUAGES)
    assert len(parallel["sw"]) == 64 * 4 * 4
    instructions = read_instructions(files["instructions"])
    first = world.instructions[0]
    assert (instructions[0].language, instructions[0].turns[-1].content) == (first["lang"], first["response"])
    questions = read_questions(files["questions"])
    assert [(q.row, q.language, q.text, q.answer) for q in questions] == [
        (row["row"], row["lang"], row["question"], row["answer"]) for row in world.questions
    ]
    assert [json.loads(line) for line in files["corpus"].read_text("utf-8").splitlines()] == world.corpus


@pytest.mark.parametrize("sizes", [{"stated": 0}, {"parallel": 300}])
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        WorldSettings(**sizes)
