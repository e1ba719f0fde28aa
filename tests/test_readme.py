"""The README's Python runs as it stands, but for the model's name and the number of steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_lines_of_the_readme_run(
    tiny_checkpoint: Path,
    parallel_text: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, using = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    for name, replacement in (
        ("meta-llama/Llama-3.2-1B", str(tiny_checkpoint)),
        ("max_steps=500", "max_steps=2"),
    ):
        assert training.count(name) == 1
        training = training.replace(name, replacement)
    rows = [
        dict(zip(parallel_text, texts, strict=True)) for texts in zip(*parallel_text.values(), strict=True)
    ]
    write(tmp_path / "parallel.jsonl", rows[:16])
    write(tmp_path / "dev.jsonl", rows[16:])
    instructions = [
        {"lang": lang, "prompt": row[lang], "response": row["en"]} for row in rows[:8] for lang in row
    ]
    write(tmp_path / "instructions.jsonl", instructions)
    monkeypatch.chdir(tmp_path)

    names: dict[str, Any] = {}
    exec(compile(training, str(README), "exec"), names)
    assert names["area"].span is not None, names["area"].reason
    tokenizer = names["tokenizer"]
    prompts = {"prompts": [rows[0]["sw"], rows[1]["en"]], "tokenizer": tokenizer, "sf": names["sf"]}
    exec(compile(using, str(README), "exec"), prompts)
    handle = prompts["model"].shifcon
    assert handle.language == "sw"
    first, back = (handle.engagements[block]["shift"] for block in (handle.forward, handle.backward))
    assert first == back > 0


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
