"""A folder to work in, and the shifcon command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shifcon_fast.cli import app

Rows = list[dict[str, object]]


@dataclass
class Outcome:
    """Exit code and everything printed, on one line so that wrapping does not matter."""

    code: int
    text: str


@dataclass
class Workplace:
    """A folder with a tiny base model, its language space and data files."""

    folder: Path
    base: Path
    rows: Rows
    instructions: Rows

    def write(self, name: str, rows: Rows | str) -> Path:
        path = self.folder / name
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    @staticmethod
    def shifcon(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, " ".join(result.output.split()))

    @staticmethod
    def snapshot(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def train_flags(self, output: Path, *more: str) -> list[str]:
        return [
            *("train", "--model", str(self.base), "--space", str(self.folder / "space")),
            *("--parallel", str(self.folder / "parallel.jsonl")),
            *("--instructions", str(self.folder / "instructions.jsonl"), "--output", str(output)),
            *("--max-steps", "3", "--per-device-train-batch-size", "4", "--contrastive-batch-size", "4"),
            *("--quantization", "none", "--disable-tqdm", "true", "--report-to", "none", *more),
        ]


@pytest.fixture(scope="session")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, parallel_text: dict[str, list[str]]
) -> Workplace:
    rows: Rows = [
        dict(zip(parallel_text, sentences, strict=True))
        for sentences in zip(*parallel_text.values(), strict=True)
    ]
    instructions: Rows = [
        {"lang": language, "prompt": row[language], "response": rows[(number + 1) % len(rows)][language]}
        for number, row in enumerate(rows)
        for language in parallel_text
    ]
    place = Workplace(tmp_path_factory.mktemp("workplace"), tiny_checkpoint, rows, instructions)
    place.write("parallel.jsonl", rows)
    place.write("instructions.jsonl", instructions)
    choices = {"en": ["Rome", "fish"], "sw": ["Roma", "samaki"]}
    place.write(
        "questions.jsonl",
        [
            *({"answer": n, "en": f"{n} ?", "sw": f"{n} :"} for n in range(4)),
            {"answer": 0, "choices": choices, "en": "Ada lives in", "sw": "Ada anaishi"},
        ],
    )
    made = place.shifcon(
        *("profile", "--model", place.base, "--parallel", place.folder / "parallel.jsonl"),
        *("--quantization", "none", "--output", place.folder / "space"),
    )
    assert made.code == 0, made.text
    return place


@pytest.fixture(scope="session")
def run(workplace: Workplace) -> Path:
    """A finished run, quantised to NF4 as users have it."""
    output = workplace.folder / "run"
    made = workplace.shifcon(*workplace.train_flags(output, "--quantization", "nf4", "--save-steps", "2"))
    assert made.code == 0, made.text
    assert "3 steps, training loss" in made.text
    return output
