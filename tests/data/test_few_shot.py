"""Prompt templates and worked examples from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.few_shot import read_few_shot, read_prompt_template


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_examples_of_several_languages_and_of_one(tmp_path: Path) -> None:
    path = write(
        tmp_path / "shots.jsonl",
        {
            "row": 0,
            "answer": 3,
            "en": {"question": "1 + 2?", "response": "3"},
            "sw": {"prompt": "a", "response": "b"},
        },
        {"lang": "en", "prompt": "2 + 2?", "response": "4"},
    )
    assert read_few_shot(path) == {"en": [("1 + 2?", "3"), ("2 + 2?", "4")], "sw": [("a", "b")]}


def test_the_exemplars_of_mgsm(shifcon_data: Path) -> None:
    examples = read_few_shot(shifcon_data / "mgsm_exemplars.jsonl")
    assert len(examples) == 11
    assert {len(pairs) for pairs in examples.values()} == {8}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"en": "x"}, r"shots\.jsonl:1: has 'en'; wanted an example by language"),
        ({"en": {"question": "x"}}, "'response' of 'en' is null"),
        ({"lang": "en", "response": "x"}, "'prompt' of 'en' is null"),
    ],
)
def test_bad_examples(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_few_shot(write(tmp_path / "shots.jsonl", row))


def test_a_template_is_a_text_or_a_file(tmp_path: Path) -> None:
    assert read_prompt_template("Q: {question}\nA:") == "Q: {question}\nA:"
    wanted = {"en": "Question: {question}", "no": "Spørsmål: {question}"}
    yaml = tmp_path / "t.yaml"
    yaml.write_text("en: 'Question: {question}'\nno: 'Spørsmål: {question}'\n", encoding="utf-8")
    assert read_prompt_template(str(yaml)) == wanted  # `no` is Norwegian, and not False
    js = tmp_path / "t.json"
    js.write_text(json.dumps(wanted), encoding="utf-8")
    assert read_prompt_template(str(js)) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "not valid YAML"),
        ("- a", "a list; wanted language: template"),
        ("", "wanted language: template"),
        ("en: Q", "'en' is 'Q'; wanted a text with {question} in it"),
        ("en: [1]", "wanted a text with {question} in it"),
        ("en: !!python/object/apply:os.system ['true']", "wanted a text with {question}"),
    ],
)
def test_bad_templates(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_prompt_template(str(path))


@pytest.mark.parametrize("template", ["Answer the question", "missing.yaml", ""])
def test_a_template_without_a_place_for_the_question(template: str) -> None:
    with pytest.raises(DataError, match=r"wanted a text with \{question\} in it, or a YAML or JSON file"):
        read_prompt_template(template)
