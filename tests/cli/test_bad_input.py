"""Bad input to the shifcon command: exit code 2, one clear line, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

Rows = list[dict[str, object]]


def test_a_template_that_refuses_is_told_with_file_and_line(workplace, tmp_path: Path) -> None:
    base = tmp_path / "chat-model"
    shutil.copytree(workplace.base, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "{{ m['content'] + ' </s> ' }}{% endfor %}"
    )
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    messages = [
        {"role": "system", "content": "Ada"},
        {"role": "user", "content": "Ada lives in"},
        {"role": "assistant", "content": "Rome"},
    ]
    rows = [workplace.instructions[0], {"lang": "sw", "messages": messages}]
    file = workplace.write("with-system.jsonl", rows)
    flags = workplace.train_flags(tmp_path / "run", "--model", str(base), "--instructions", str(file))
    refused = workplace.shifcon(*flags)
    assert refused.code == 2
    assert "with-system.jsonl:2: the tokenizer's chat template refuses" in refused.text
    assert "No system role" in refused.text
    assert "first user message" in refused.text
    assert not (tmp_path / "run" / "shifcon.json").exists()
    made = workplace.shifcon(*flags, "--use-chat-template", "false")
    assert made.code == 0, made.text


def _malformed(rows: Rows) -> str:
    lines = [json.dumps(row) for row in rows]
    lines[4] = lines[4][:-3]
    return "\n".join(lines)


def _without(rows: Rows, language: str, numbers: range) -> Rows:
    return [
        {key: value for key, value in row.items() if key != language or number not in numbers}
        for number, row in enumerate(rows)
    ]


BAD_PARALLEL: list[tuple[str, Callable[[Rows], Rows | str], str]] = [
    ("malformed", _malformed, r"bad.jsonl:5: not valid JSON"),
    ("missing", lambda rows: _without(rows, "sw", range(2, 5)), "'sw' in 3 of 24 rows"),
    ("empty", lambda rows: [*rows[:6], {**rows[6], "de": " "}, *rows[7:]], "bad.jsonl:7: 'de' is empty"),
    ("no pivot", lambda rows: _without(rows, "en", range(24)), "pivot: got 'en'"),
    ("one row", lambda rows: rows[:1], "wanted at least two sentences"),
    ("too long", lambda rows: [*rows, dict.fromkeys(rows[0], "Ada " * 200)], "128"),
    ("nothing", lambda rows: "", "holds no rows"),
]


@pytest.mark.parametrize(("kind", "spoil", "message"), BAD_PARALLEL, ids=[row[0] for row in BAD_PARALLEL])
def test_bad_parallel_text_is_refused(
    workplace, kind: str, spoil: Callable[[Rows], Rows | str], message: str
) -> None:
    path = workplace.write("bad.jsonl", spoil(workplace.rows))
    output = workplace.folder / f"space-{kind}"
    refused = workplace.shifcon(
        *("profile", "--model", workplace.base, "--parallel", path, "--quantization", "none"),
        *("--output", output),
    )
    assert refused.code == 2
    assert message in refused.text
    assert not output.exists()


def test_rows_with_a_missing_language_can_be_dropped(workplace) -> None:
    path = workplace.write("gaps.jsonl", _without(workplace.rows, "sw", range(2, 5)))
    output = workplace.folder / "space-gaps"
    made = workplace.shifcon(
        *("profile", "--model", workplace.base, "--parallel", path, "--quantization", "none"),
        *("--output", output, "--allow-missing"),
    )
    assert made.code == 0, made.text
    assert json.loads((output / "language_space.json").read_text())["sentences"]["sw"] == 21


def test_a_space_of_another_model_is_refused(workplace, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(workplace.base, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    save_file(
        {**weights, name: weights[name].flip(0).contiguous()}, other / "model.safetensors", {"format": "pt"}
    )
    flags = workplace.train_flags(tmp_path / "out")
    flags[flags.index("--model") + 1] = str(other)
    refused = workplace.shifcon(*flags)
    assert refused.code == 2
    assert "not on this model" in refused.text
    assert not (tmp_path / "out" / "shifcon.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--forward", "2", "--backward", "2"], "wanted forward < backward"),
        (["--forward", "2", "--backward", "9"], "backward: got boundary 9"),
        (["--parallel", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--quantization", "int8"], 'wanted "nf4" or "none"'),
        (["--space", "nowhere"], "nowhere"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--max-stpes", "3"], "did you mean 'max_steps'"),
    ],
)
def test_bad_arguments_are_refused(workplace, tmp_path: Path, more: list[str], message: str) -> None:
    refused = workplace.shifcon(*workplace.train_flags(tmp_path / "out", *more))
    assert refused.code == 2
    assert message in refused.text
    assert not (tmp_path / "out" / "shifcon.json").exists()


def test_an_unknown_language_code_is_refused(workplace, run: Path, tmp_path: Path) -> None:
    asked = workplace.shifcon("generate", "--model", run, "--language", "xx", "Ada")
    assert (asked.code, "wanted one of en, de, sw, tr" in asked.text) == (2, True)

    strange = workplace.write("strange.jsonl", [{"lang": "xx", "prompt": "Ada", "response": "Ben"}])
    refused = workplace.shifcon(*workplace.train_flags(tmp_path / "out", "--instructions", str(strange)))
    assert refused.code == 2
    assert "'xx', which the language space does not know" in refused.text


def test_a_prompt_beyond_the_context_is_refused(workplace, run: Path) -> None:
    """The model's context holds 128 tokens; an answer ends with it."""
    flags = ("generate", "--model", run, "--language", "sw")
    refused = workplace.shifcon(*flags, "Ada " * 200)
    assert refused.code == 2
    assert "has 201 tokens; the model's context holds 128, answer included: shorten it" in refused.text
    answered = workplace.shifcon(*flags, "Ada " * 120)
    assert answered.code == 0
    assert "Answers are no longer than what the model's context of 128 tokens leaves them" in answered.text


def test_a_folder_that_is_not_ours_is_refused(workplace, tmp_path: Path) -> None:
    flags = workplace.train_flags(tmp_path / "out", "--space", str(tmp_path))
    assert workplace.shifcon(*flags).code == 2
    reported = workplace.shifcon("report", tmp_path)
    assert reported.code == 2
    assert str(tmp_path) in reported.text
    assert list(tmp_path.iterdir()) == []
