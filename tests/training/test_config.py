"""A run's configuration: the file sets, flags override, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from shifcon_fast.training.config import describe_fields, parse_config

FILE = """\
model: org/model
parallel: parallel.jsonl
instructions: instructions.jsonl
output: {output}
languages: [en, sw]
shift: false
w_mcl: 0.5
max_steps: 200
learning_rate: 5.0e-4
"""
REQUIRED = ["--model", "m", "--parallel", "p.jsonl", "--instructions", "i.jsonl"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE.format(output=tmp_path / "run"))
    return path


def test_the_file_sets_and_flags_override(file: Path) -> None:
    run, arguments = parse_config(
        file, ["--max-steps", "7", "--w-mcl=1.5", "--lora-r", "4", "--allow-missing"]
    )
    assert (run.model, run.languages, run.lora_r, run.lora_alpha) == ("org/model", ["en", "sw"], 4, 32)
    assert run.allow_missing is True
    assert (arguments.max_steps, arguments.w_mcl, arguments.learning_rate) == (7, 1.5, 5e-4)
    assert arguments.shift is False
    assert Path(arguments.output_dir) == file.parent / "run"


def test_switches_can_be_turned_both_ways(file: Path) -> None:
    assert parse_config(file, ["--shift", "true"])[1].shift is True
    assert parse_config(None, [*REQUIRED, "--output", "x", "--no-shift"])[1].shift is False
    assert parse_config(None, [*REQUIRED, "--output", "x"])[1].shift is True


def test_lists_and_mappings_reach_their_fields(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "lora_target_modules: [q_proj, v_proj]\ngradient_checkpointing_kwargs: {use_reentrant: false}\n"
    )
    run, arguments = parse_config(file, [*REQUIRED, "--output", str(tmp_path)])
    assert run.lora_target_modules == ["q_proj", "v_proj"]
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_yaml_is_read_as_yaml_1_2(tmp_path: Path) -> None:
    """Norwegian is a language, `no` a strategy, 1e-4 a number, and 010 ten."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "languages: [en, no, sv, on, y]\neval_strategy: no\nsave_strategy: steps\nlearning_rate: 1e-4\n"
        "lr_scheduler_kwargs: {a: 1e-4, b: no, c: 010, d: 0x1F, e: .5, f: 12:30, g: ~, h: True, i: 2026-01-02}\n"
        "max_steps: 0o17\nspace: null\n"
    )
    run, arguments = parse_config(file, [*REQUIRED, "--output", str(tmp_path)])
    assert run.languages == ["en", "no", "sv", "on", "y"]
    assert arguments.eval_strategy.value == "no"
    assert (arguments.learning_rate, arguments.max_steps, run.space) == (1e-4, 15, None)
    assert arguments.lr_scheduler_kwargs == {
        **{"a": 1e-4, "b": "no", "c": 10, "d": 31, "e": 0.5, "f": "12:30", "g": None, "h": True},
        "i": "2026-01-02",
    }


@pytest.mark.parametrize("written", ["languages: en,no", "languages: [en, no]", "languages:\n- en\n- no"])
def test_lists_are_read_in_every_form(tmp_path: Path, written: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{written}\nlora_target_modules: q_proj, v_proj\n")
    run, _ = parse_config(file, [*REQUIRED, "--output", str(tmp_path)])
    assert (run.languages, run.lora_target_modules) == (["en", "no"], ["q_proj", "v_proj"])
    for flags in (["--languages", "en,no"], ["--languages", "en", "no"], ["--languages=en,no"]):
        assert parse_config(None, [*REQUIRED, "--output", str(tmp_path), *flags])[0].languages == ["en", "no"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-step", "7"], "unknown flag --max-step; did you mean 'max_steps'"),
        (["--max-steps", "seven"], "max_steps.*'seven'"),
        (["stray"], "got 'stray'; wanted flags"),
        (["--temperature", "0"], "temperature: got 0.0; wanted a positive number"),
        (["--forward", "3", "--backward", "3"], "wanted forward < backward"),
        (["--recipe", "fancy"], "recipe: got 'fancy'; wanted one of stable, official"),
    ],
)
def test_bad_flags_are_named(file: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(file, flags)


def test_what_is_required_is_named() -> None:
    with pytest.raises(ValueError, match="required: --model, --parallel, --instructions"):
        parse_config(None, ["--output", "x"])
    with pytest.raises(ValueError, match="output: not given"):
        parse_config(None, REQUIRED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed", "not valid YAML"),
        ("- a\n- b\n", "holds a list"),
        ("modle: x\n", "unknown field 'modle'; did you mean 'model'"),
        ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),  # it runs nothing
        ("model: x\nparallel: y\nmodel: z\n", "not valid YAML.*'model' is there twice"),
        ("output: x\noutput-dir: y\n", "'output_dir' is there twice, the second time as 'output-dir'"),
        ("languages: [[en], [sw]]\n", r"languages is \[\['en'\], \['sw'\]\]; wanted a list of names"),
        ("languages: []\n", r"languages is \[\]; wanted a list of names"),
        ("languages: [en, --overwrite]\n", "languages is .*; wanted values, not flags"),
        ("? [a, b]\n: c\n", "not valid YAML"),
        ("a: &a [*a]\n", "unknown field 'a'|not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("max_steps: 1\x00", "not valid YAML"),
        ("model: !!timestamp x\n", "not valid YAML"),
        ("max_steps: !!int x\n", "not valid YAML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.yaml: {message}"):
        parse_config(file)
    with pytest.raises(ValueError, match=r"none\.yaml: no such file"):
        parse_config(tmp_path / "none.yaml")


def test_every_field_is_described() -> None:
    described = {name: text for name, text, _ in describe_fields()}
    assert {"model", "space", "w_mcl", "vectors", "max_steps", "learning_rate"} <= described.keys()
    ours = ("model", "quantization", "recipe", "shift", "temperature", "max_length")
    assert all(described[name] for name in ours)
