"""Prompt templates and worked examples, from files, by language."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.row import check_text
from shifcon_fast.data.rows import read_rows

PLACE = "{question}"
"""Where the question goes in a template."""


def read_few_shot(file: str | Path) -> dict[str, list[tuple[str, str]]]:
    """Worked examples, language → (question, response) pairs, in the order of the file.

    A row holds an example in several languages, ``{"en": {"question": ..., "response": ...}, "sw": {...}}`` (MGSM's
    exemplars), or in one, ``{"lang": "sw", "prompt": ..., "response": ...}``, as in instruction data (``question``
    is taken for ``prompt``).

    Raises:
        DataError: a row with neither, or an empty text.
    """
    examples: dict[str, list[tuple[str, str]]] = {}
    for row in read_rows(file):
        if "lang" in row.value:
            found: dict[str, Mapping[str, Any]] = {
                check_text(row.value["lang"], row.where, "'lang'"): row.value
            }
        else:
            found = {key: value for key, value in row.value.items() if isinstance(value, Mapping)}
        if not found:
            raise DataError(
                f"{row.where}: has {', '.join(map(repr, row.value))}; wanted an example by language, as in "
                '{"en": {"question": "...", "response": "..."}}, or "lang", "prompt" and "response"'
            )
        for language, example in found.items():
            key = "question" if example.get("question") is not None else "prompt"
            texts = [
                check_text(example.get(name), row.where, f"{name!r} of {language!r}")
                for name in (key, "response")
            ]
            examples.setdefault(language, []).append((texts[0], texts[1]))
    return examples


def read_prompt_template(template: str) -> str | dict[str, str]:
    """A template: the text itself where it holds ``{question}``, else a YAML or JSON file of language → template.

    Raises:
        DataError: neither; a file that is not a mapping of texts with ``{question}`` in them.
    """
    if PLACE in template:
        return template
    path = Path(template)
    if path.suffix.lower() not in (".yaml", ".yml", ".json") or not path.is_file():
        raise DataError(
            f"prompt_template is {template!r}; wanted a text with {PLACE} in it, or a YAML or JSON file of "
            "language: template"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        # BaseLoader makes nothing but strings, lists and mappings: `no` stays Norwegian.
        found = json.loads(text) if is_json else yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not valid {path.suffix[1:].upper()} ({error})") from error
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path}: a {type(found).__name__}; wanted language: template")
    for language, each in found.items():
        if not isinstance(each, str) or PLACE not in each:
            raise DataError(f"{path}: {language!r} is {each!r}; wanted a text with {PLACE} in it")
    return found
