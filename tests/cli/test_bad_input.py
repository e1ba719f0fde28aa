"""Bad input to the shifcon command: exit code 2, one clear line, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.workflow import train_run

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


def _spoilt(space: LanguageSpace, kind: str) -> LanguageSpace:
    """A space that cannot give every intervention."""
    if kind == "older":
        return replace(space, covariances={})
    if kind == "bare":
        return replace(space, bases={}, variances={}, covariances={})
    parts = (space.bases, space.variances, space.covariances)
    bases, variances, covariances = (dict(part) for part in parts)
    for key in [each for each in bases if each[1] == "sw"]:
        bases[key], variances[key] = bases[key][:, :0], variances[key][:0]
        del covariances[key]
    return replace(space, bases=bases, variances=variances, covariances=covariances)


@pytest.mark.parametrize(
    ("kind", "intervention", "message"),
    [
        ("bare", "subspace", "intervention: 'subspace' moves along subspaces, and there are no subspaces at"),
        (
            "bare",
            "procrustes",
            "intervention: 'procrustes' moves along subspaces, and there are no subspaces at",
        ),
        ("older", "affine", "intervention: 'affine' needs to know how translations vary together"),
        ("flat", "subspace", "that of 'sw' has rank 0"),
    ],
)
def test_an_intervention_that_the_space_cannot_give_is_refused_before_a_model_loads(
    *, workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, intervention: str, message: str
) -> None:
    _spoilt(LanguageSpace.load(workplace.folder / "space"), kind).save(tmp_path / "space")
    flags = ("--space", str(tmp_path / "space"), "--intervention", intervention)
    swept = workplace.shifcon(
        *("sweep", "--model", workplace.base, "--parallel", workplace.folder / "parallel.jsonl"),
        *("--quantization", "none", *flags),
    )
    assert swept.code == 2
    assert message in swept.text
    assert "unshifted:" not in swept.text  # nothing was measured for it
    assert not (tmp_path / "space" / "sweep.json").exists()
    monkeypatch.setattr(train_run, "load_quantized", lambda *_, **__: pytest.fail("the model was loaded"))
    area = ("--forward", "1", "--backward", "3")
    trained = workplace.shifcon(*workplace.train_flags(tmp_path / "run", *flags, *area))
    assert trained.code == 2
    assert message in trained.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--targets", "en,xx"], "targets: language: got 'xx'; wanted one of en, de, sw, tr"),
        (["--targets", "sw,swh_Latn"], "targets: got ['sw', 'swh_Latn']; wanted every language once"),
        (["--learn-alpha", "--no-shift"], "learn_alpha: got True with shift=False"),
        (["--w-anchor", "-1"], "w_anchor: got -1.0; wanted 0 or more"),
        (["--mcl-mode", "unshifted", "--temperature", "0"], "temperature: got 0.0; wanted a positive number"),
        (["--translation-instructions", "-1"], "translation_instructions: got -1; wanted 0 or more"),
        (["--translation-temperature", "0"], "translation_temperature: got 0.0; wanted a number above 0"),
        (["--translation-directions", "up"], "translation_directions: got 'up'; wanted one of both"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_method_arguments_are_refused_before_a_model_loads(
    workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.setattr(train_run, "load_quantized", lambda *_, **__: pytest.fail("the model was loaded"))
    refused = workplace.shifcon(*workplace.train_flags(tmp_path / "run", *more))
    assert refused.code == 2
    assert message in refused.text


def test_baselines_train_from_flags(workplace, tmp_path: Path) -> None:
    plain = ["--no-shift", "--max-steps", "1"]
    aligned = workplace.shifcon(
        *workplace.train_flags(tmp_path / "afp", *plain, "--mcl-mode", "unshifted", "--temperature", "0.2")
    )
    assert aligned.code == 0, aligned.text
    settings = json.loads((tmp_path / "afp" / "shifcon.json").read_text())["training"]
    assert (settings["mcl_mode"], settings["temperature"], settings["shift"]) == ("unshifted", 0.2, False)
    more = ["--w-mcl", "0", "--translation-instructions", "8", "--translation-temperature", "5"]
    translating = workplace.shifcon(*workplace.train_flags(tmp_path / "qalign", *plain, *more))
    assert translating.code == 0, translating.text
    trained = [json.loads((tmp_path / name / "shifcon.json").read_text()) for name in ("afp", "qalign")]
    counts = [sum(each["training"]["examples"].values()) for each in trained]
    assert counts[1] == counts[0] + 8
