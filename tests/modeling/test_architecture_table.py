"""The committed table of docs/architectures.md is the one that the rows and the tests make."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "architecture_table.py"
    spec = importlib.util.spec_from_file_location("architecture_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_the_generated_one(script):
    page = script.PAGE.read_text(encoding="utf-8")
    made = {"table": script.table(script.tested_rows())}
    assert script.filled(page, script.COMMAND, made) == page, "run make architectures"


def test_what_is_tested_for_some_rows_alone_is_a_column(script):
    rows = {row.model_type for row in script.ARCHITECTURES.values()}
    made = script.table({"everything": rows, "something": {"llama"}}).splitlines()
    assert "* everything" in made
    assert "| `llama` | `LlamaDecoderLayer` | `pre_norm` | 2 | `llama` | yes |" in made
    assert "| `mistral` | `MistralDecoderLayer` | `pre_norm` | 2 | `llama` | – |" in made
    assert sum(line.startswith("| `") for line in made) - 1 == len(rows)


def test_the_number_of_rows_is_what_the_readme_says(script):
    readme = (script.REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"**{len(script.ARCHITECTURES)} architectures**" in readme
