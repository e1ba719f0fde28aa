"""The shifcon command as a user meets it: the whole way through, and every kind of bad input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import shifcon_fast as sf
from shifcon_fast import storage, workflow
from shifcon_fast.cli import app
from shifcon_fast.data import parallel
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.opening import open_model
from shifcon_fast.training.trainer import ShifConTrainer

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

    def train_flags(self, output: Path, *more: str) -> list[str]:
        return [
            *("train", "--model", str(self.base), "--space", str(self.folder / "space")),
            *("--parallel", str(self.folder / "parallel.jsonl")),
            *("--instructions", str(self.folder / "instructions.jsonl"), "--output", str(output)),
            *("--max-steps", "3", "--per-device-train-batch-size", "4", "--contrastive-batch-size", "4"),
            *("--quantization", "none", "--disable-tqdm", "true", "--report-to", "none", *more),
        ]


def shifcon(*arguments: object) -> Outcome:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, " ".join(result.output.split()))


@pytest.fixture(scope="module")
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
    made = shifcon(
        *("profile", "--model", place.base, "--parallel", place.folder / "parallel.jsonl"),
        *("--quantization", "none", "--output", place.folder / "space"),
    )
    assert made.code == 0, made.text
    return place


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the whole way through --------------------------------------------------------------------------------------


def test_profile_writes_a_space_an_area_and_a_picture(workplace: Workplace) -> None:
    area = json.loads((workplace.folder / "space" / "area.json").read_text())
    assert 1 <= area["forward"] < area["backward"] <= 3
    assert len(area["distances"]) == 4
    assert b"<svg" in (workplace.folder / "space" / "distance.svg").read_bytes()


@pytest.mark.parametrize("command", ["profile", "train"])
def test_a_sentence_is_checked_once(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """On its way from the command to the language space, and to the trainer."""
    checked: list[object] = []
    original = parallel.check_text

    def check_text(value: object, *args: Any, **options: Any) -> str:
        checked.append(value)
        return original(value, *args, **options)

    monkeypatch.setattr(parallel, "check_text", check_text)
    flags = workplace.train_flags(tmp_path, "--max-steps", "1")
    space = flags.index("--space")
    profile = ["profile", *flags[1:3], *flags[space + 2 : space + 4], "--quantization", "none"]
    made = shifcon(
        *([*profile, "--output", tmp_path] if command == "profile" else [*flags[:space], *flags[space + 2 :]])
    )
    assert made.code == 0, made.text
    assert len(checked) == len(workplace.rows) * len(workplace.rows[0])


@pytest.fixture(scope="module")
def run(workplace: Workplace) -> Path:
    """A finished run, quantised to NF4 as users have it."""
    output = workplace.folder / "run"
    made = shifcon(*workplace.train_flags(output, "--quantization", "nf4", "--save-steps", "2"))
    assert made.code == 0, made.text
    assert "3 steps, training loss" in made.text
    return output


def test_train_evaluate_report_generate(workplace: Workplace, run: Path) -> None:
    log = json.loads((run / "training_log.json").read_text())["steps"]
    assert {"loss_generation", "loss_contrastive"} <= log[0].keys()

    results = workplace.folder / "results"
    evaluated = shifcon(
        *(
            "evaluate",
            "--model",
            run,
            "--against",
            workplace.base,
            "--output",
            results,
            "--max-new-tokens",
            "4",
        ),
        *(
            "--parallel",
            workplace.folder / "parallel.jsonl",
            "--questions",
            workplace.folder / "questions.jsonl",
        ),
    )
    assert evaluated.code == 0, evaluated.text
    comparison = json.loads((results / "comparison.json").read_text())
    assert comparison["accuracy"].keys() == {"en", "sw"}
    assert comparison["log_perplexity"].keys() == {"en", "de", "sw", "tr"}
    assert comparison["choice_accuracy"].keys() == comparison["choice_accuracy_norm"].keys() == {"en", "sw"}
    assert "acc unshifted" in evaluated.text
    assert "acc, shifted - unshifted" in evaluated.text
    assert "right choices sw" in evaluated.text

    again = shifcon(  # an earlier evaluation serves as well as a model
        *("evaluate", "--model", run, "--against", results, "--output", workplace.folder / "again"),
        *("--questions", workplace.folder / "questions.jsonl", "--max-new-tokens", "4"),
    )
    assert again.code == 0, again.text
    same = json.loads((workplace.folder / "again" / "comparison.json").read_text())["accuracy"]["sw"]
    assert (same["estimate"], same["low"], same["high"]) == (0.0, 0.0, 0.0)

    for folder in (results, run, workplace.folder / "space"):
        reported = shifcon("report", folder)
        assert reported.code == 0, reported.text
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert "<svg" in page or "data:image" in page
        assert 'src="http' not in page  # self-contained
        assert "<script src" not in page

    answers = shifcon("generate", "--model", run, "--language", "sw", "--max-new-tokens", "3", "Ada anaishi")
    assert answers.code == 0, answers.text


def test_prompts_of_an_evaluation_are_what_the_flags_say(workplace: Workplace, tmp_path: Path) -> None:
    lines = {"en": r"Question: {question}\nAnswer:", "sw": r"Swali: {question}\nJibu:"}
    template = workplace.write("t.yaml", "".join(f'{code}: "{line}"\n' for code, line in lines.items()))
    example = {"question": "Question: 1 ?", "response": "Answer: 1"}
    shots: Rows = [{"en": example, "sw": {"question": "2", "response": "2"}}]
    command = (
        *("evaluate", "--model", workplace.base, "--quantization", "none", "--max-new-tokens", "2"),
        *(
            "--questions",
            workplace.folder / "questions.jsonl",
            "--few-shot",
            workplace.write("shots.jsonl", shots),
        ),
    )
    done = shifcon(*command, "--prompt-template", template, "--output", tmp_path / "file")
    assert done.code == 0, done.text
    found = json.loads((tmp_path / "file" / "evaluation.json").read_text())
    assert found["settings"]["prompt_template"]["sw"] == "Swali: {question}\nJibu:"
    assert found["settings"]["few_shot"] == {"en": 1, "sw": 1}
    assert found["settings"]["stop_strings"][0] == "\n"  # the examples answer in one line

    done = shifcon(
        *(*command, "--prompt-template", r"Q: {question}\nA:", "--stop", r"\nQ:", "--stop", "?"),
        *("--output", tmp_path / "text", "--against", tmp_path / "file"),
    )
    assert done.code == 0, done.text
    assert "note: the two differ in prompt_template: they were not asked the same" in done.text
    settings = json.loads((tmp_path / "text" / "evaluation.json").read_text())["settings"]
    assert settings["prompt_template"] == "Q: {question}\nA:"
    assert settings["stop_strings"] == ["\nQ:", "?"]
    refused = shifcon(*command, "--prompt-template", "Q:", "--output", tmp_path / "refused")
    assert refused.code == 2
    assert "wanted a text with {question} in it" in refused.text


def test_a_yaml_file_and_flags_make_the_same_run(workplace: Workplace, run: Path) -> None:
    flags = workplace.train_flags(
        workplace.folder / "from-yaml", "--quantization", "nf4", "--save-steps", "2"
    )
    names = [flag[2:].replace("-", "_") for flag in flags[1::2]]
    lines = dict(zip(names, flags[2::2], strict=True)) | {"max_steps": "1"}
    file = workplace.write("run.yaml", "".join(f"{name}: {value}\n" for name, value in lines.items()))
    made = shifcon("train", "--config", file, "--max-steps", "3")
    assert made.code == 0, made.text
    ours = load_file(workplace.folder / "from-yaml" / "adapter_model.safetensors")
    theirs = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("used", [True, False])
def test_prompts_are_joined_as_in_training(workplace: Workplace, tmp_path: Path, used: bool) -> None:
    base = tmp_path / "chat-model"
    shutil.copytree(workplace.base, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    made = shifcon(
        *workplace.train_flags(tmp_path / "run", "--model", str(base), "--use-chat-template", str(used))
    )
    assert made.code == 0, made.text
    _, tokenizer = open_model(str(tmp_path / "run"))
    assert (tokenizer.chat_template == template) is used
    assert (tokenizer.chat_template is None) is not used


@pytest.mark.parametrize(("flags", "in_4bit"), [((), False), (("--quantization", "nf4"), True)])
def test_a_run_is_evaluated_in_the_precision_it_was_trained_in(
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    in_4bit: bool,
) -> None:
    made = shifcon(*workplace.train_flags(tmp_path / "run", "--max-steps", "1"))
    assert made.code == 0, made.text
    seen = []

    def measure(model: Any, *args: Any, **settings: Any) -> EvaluationResult:
        seen.append(bool(getattr(model.get_base_model(), "is_loaded_in_4bit", False)))
        return evaluate(model, *args, **settings)

    monkeypatch.setattr(workflow, "measure", measure)
    evaluated = shifcon(
        *("evaluate", "--model", tmp_path / "run", "--output", tmp_path / "results", *flags),
        *("--questions", workplace.folder / "questions.jsonl", "--max-new-tokens", "1"),
    )
    assert evaluated.code == 0, evaluated.text
    assert seen == [in_4bit]


def test_a_plain_model_ends_answers_where_its_template_ends_a_turn(
    workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ChatML on a base model: the model's own settings know nothing of what ends a turn."""
    base = tmp_path / "chat-model"
    shutil.copytree(workplace.base, base)
    model, _ = open_model(str(base), quantization="none")
    assert model.generation_config.eos_token_id == [2]
    assert not caplog.records
    settings = json.loads((base / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] + ' <unk> ' }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    model, _ = open_model(str(base), quantization="none")
    assert model.generation_config.eos_token_id == [3, 2]
    assert "end answers at </s>; its tokenizer ends a turn with <unk>" in caplog.text


def test_two_models_are_never_in_memory(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[weakref.ref[torch.nn.Module]] = []

    def opened(name: str, **options: Any) -> tuple[Any, Any]:
        assert all(weight() is None for weight in weights), "the first is still there"
        model, tokenizer = open_model(name, **options)
        weights.append(weakref.ref(next(model.parameters())))
        return model, tokenizer

    monkeypatch.setattr(workflow, "open_model", opened)
    monkeypatch.setattr(workflow.gc, "collect", lambda: 0)  # nor does it take the garbage collector
    made = shifcon(*workplace.train_flags(tmp_path / "run", "--max-steps", "1"))
    assert made.code == 0, made.text
    evaluated = shifcon(
        *("evaluate", "--model", tmp_path / "run", "--against", workplace.base, "--quantization", "none"),
        *("--output", tmp_path / "results", "--parallel", workplace.folder / "parallel.jsonl"),
    )
    assert evaluated.code == 0, evaluated.text
    assert len(weights) == 2


def test_a_template_that_refuses_is_told_with_file_and_line(workplace: Workplace, tmp_path: Path) -> None:
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
    refused = shifcon(*flags)
    assert refused.code == 2
    assert "with-system.jsonl:2: the tokenizer's chat template refuses" in refused.text
    assert "No system role" in refused.text
    assert "first user message" in refused.text
    assert not (tmp_path / "run" / "shifcon.json").exists()
    made = shifcon(*flags, "--use-chat-template", "false")
    assert made.code == 0, made.text


def test_a_folder_with_a_run_is_not_overwritten_unasked(workplace: Workplace, run: Path) -> None:
    before = snapshot(run)
    refused = shifcon(*workplace.train_flags(run))
    assert refused.code == 2
    assert "holds a run already; --resume" in refused.text
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--pivot", "fr"), "pivot: got 'fr'"),
        (("--lora-target-modules", "no_such_layer"), "no_such_layer"),
        (("--forward", "3", "--backward", "2"), "forward"),
        (("--max-length", "2", "--too-long", "error"), "max_length"),
        (("--resume",), "resume, overwrite: both given"),
    ],
)
def test_overwrite_deletes_nothing_for_a_run_that_is_refused(
    workplace: Workplace, run: Path, tmp_path: Path, flags: tuple[str, ...], problem: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    result = shifcon(*workplace.train_flags(tmp_path / "run", "--overwrite", *flags))
    assert result.code == 2, result.text
    assert problem in result.text
    assert snapshot(tmp_path / "run") == before


def test_overwrite_leaves_nothing_of_the_old_run_to_be_loaded(
    workplace: Workplace, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new run dies in its first step."""
    output = tmp_path / "run"
    shutil.copytree(run, output)
    shutil.copytree(output, tmp_path / "copy")
    (tmp_path / "copy").rename(output / "checkpoint-99")
    (output / "notes.txt").write_text("mine")
    (output / "evaluation.json").write_text("of the old run")

    def die(*args: object, **kwargs: object) -> None:
        raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(ShifConTrainer, "training_step", die)
        result = shifcon(*workplace.train_flags(output, "--overwrite"))
    assert result.code == 1
    assert "went away" in result.text
    assert not list(output.rglob("adapter_*"))
    assert not (output / "evaluation.json").exists()
    assert (output / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="not ours; wanted a run folder"):
        sf.load(output)
    result = shifcon(*workplace.train_flags(output))  # and the folder is free for another try
    assert result.code == 0, result.text
    assert sf.load(output).shifcon.forward == sf.load(run).shifcon.forward


def test_an_adapter_of_someone_else_is_not_overwritten_unasked(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    result = shifcon(*workplace.train_flags(tmp_path))
    assert (result.code, snapshot(tmp_path)) == (2, {"adapter_config.json": b"{}"})
    assert "holds a run already" in result.text


def test_resume_without_a_checkpoint_is_refused(workplace: Workplace) -> None:
    refused = shifcon(*workplace.train_flags(workplace.folder / "fresh", "--resume"))
    assert refused.code == 2
    assert "has no checkpoint" in refused.text
    assert not (workplace.folder / "fresh").exists()


def test_doctor_names_every_operator_and_its_backend() -> None:
    told = shifcon("doctor", "--json")
    assert told.code == 0
    found = json.loads(told.text)
    assert {row["operator"] for row in found["operators"] if row["device"] == "cpu"} == {
        "add_shift_rms_norm",
        "masked_mean_pool",
        "info_nce",
        "contrastive_similarity",
        "subspace_project",
    }
    assert found["nf4"]["cpu"] == "works"
    assert found["extras"] == {"cli": "installed", "eval": "installed", "data": "installed"}
    assert found["versions"]["torch"] == torch.__version__
    assert "operators" in shifcon("doctor").text


@pytest.mark.parametrize(
    "command", ["doctor", "profile", "sweep", "train", "evaluate", "generate", "report", "demo"]
)
def test_every_command_explains_itself(command: str) -> None:
    helped = shifcon(command, "--help")
    assert helped.code == 0
    assert len(helped.text) > 200


def test_help_all_lists_every_field() -> None:
    listed = shifcon("train", "--help-all").text
    assert all(
        f"--{flag} " in listed for flag in ("w-mcl", "lora-r", "vectors", "gradient-accumulation-steps")
    )


def test_data_as_people_have_it(workplace: Workplace, tmp_path: Path) -> None:
    """FLORES codes, CSV, gzip, a column that is no language: what was taken is said; another pivot is chosen."""
    lines = [
        "id,deu_Latn,src,swh_Latn",
        *(f"x-{n},{row['de']},a b,{row['sw']}" for n, row in enumerate(workplace.rows)),
    ]
    path = tmp_path / "pairs.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    flags = (
        "--model",
        workplace.base,
        "--parallel",
        path,
        "--quantization",
        "none",
        "--output",
        tmp_path / "out",
    )
    refused = shifcon("profile", *flags)
    assert refused.code == 2
    assert "pivot: got 'en'" in refused.text
    assert "has deu_Latn, swh_Latn; choose one of them with --pivot" in refused.text
    made = shifcon("profile", *flags, "--pivot", "de")
    assert made.code == 0, made.text
    assert (
        "languages deu_Latn, swh_Latn; other fields, left out: id, src. If src are languages too" in made.text
    )
    assert json.loads((tmp_path / "out" / "language_space.json").read_text())["pivot"] == "deu_Latn"
    measured = shifcon("evaluate", *flags[:-1], tmp_path / "results", "--pivot", "de", "--languages", "sw")
    assert measured.code == 0, measured.text
    result = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert (result["pivot"], list(result["perplexity"]["unshifted"])) == ("de", ["de", "sw"])


def test_a_run_whose_base_moved(workplace: Workplace, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    card = json.loads((moved / "shifcon.json").read_text())
    (moved / "shifcon.json").write_text(json.dumps({**card, "base_model": str(tmp_path / "gone")}))
    flags = ("generate", "--model", moved, "--language", "swh_Latn", "--max-new-tokens", "2", "Ada")
    refused = shifcon(*flags)
    assert (refused.code, "pass base= (--base)" in refused.text) == (2, True)
    assert shifcon(*flags, "--base", workplace.base).code == 0


# --- bad input: exit code 2, one clear line, nothing half-written -------------------------------------------------


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
    workplace: Workplace, kind: str, spoil: Callable[[Rows], Rows | str], message: str
) -> None:
    path = workplace.write("bad.jsonl", spoil(workplace.rows))
    output = workplace.folder / f"space-{kind}"
    refused = shifcon(
        *("profile", "--model", workplace.base, "--parallel", path, "--quantization", "none"),
        *("--output", output),
    )
    assert refused.code == 2
    assert message in refused.text
    assert not output.exists()


def test_rows_with_a_missing_language_can_be_dropped(workplace: Workplace) -> None:
    path = workplace.write("gaps.jsonl", _without(workplace.rows, "sw", range(2, 5)))
    output = workplace.folder / "space-gaps"
    made = shifcon(
        *("profile", "--model", workplace.base, "--parallel", path, "--quantization", "none"),
        *("--output", output, "--allow-missing"),
    )
    assert made.code == 0, made.text
    assert json.loads((output / "language_space.json").read_text())["sentences"]["sw"] == 21


def test_a_space_of_another_model_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(workplace.base, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    save_file(
        {**weights, name: weights[name].flip(0).contiguous()}, other / "model.safetensors", {"format": "pt"}
    )
    flags = workplace.train_flags(tmp_path / "out")
    flags[flags.index("--model") + 1] = str(other)
    refused = shifcon(*flags)
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
def test_bad_arguments_are_refused(
    workplace: Workplace, tmp_path: Path, more: list[str], message: str
) -> None:
    refused = shifcon(*workplace.train_flags(tmp_path / "out", *more))
    assert refused.code == 2
    assert message in refused.text
    assert not (tmp_path / "out" / "shifcon.json").exists()


def test_an_unknown_language_code_is_refused(workplace: Workplace, run: Path, tmp_path: Path) -> None:
    asked = shifcon("generate", "--model", run, "--language", "xx", "Ada")
    assert (asked.code, "this language space knows en, de, sw, tr" in asked.text) == (2, True)

    strange = workplace.write("strange.jsonl", [{"lang": "xx", "prompt": "Ada", "response": "Ben"}])
    refused = shifcon(*workplace.train_flags(tmp_path / "out", "--instructions", str(strange)))
    assert refused.code == 2
    assert "'xx', which the language space does not know" in refused.text


def test_a_folder_that_is_not_ours_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    flags = workplace.train_flags(tmp_path / "out", "--space", str(tmp_path))
    assert shifcon(*flags).code == 2
    reported = shifcon("report", tmp_path)
    assert reported.code == 2
    assert str(tmp_path) in reported.text
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "space"
    shutil.copytree(workplace.folder / "space", output)
    before = snapshot(output)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", no_space)
    refused = shifcon(
        *("profile", "--model", workplace.base, "--parallel", workplace.folder / "parallel.jsonl"),
        *("--quantization", "none", "--output", output),
    )
    assert refused.code == 1
    assert "no space left on the disk" in refused.text
    assert snapshot(output) == before


def test_a_loss_that_is_not_a_number_stops_the_run(workplace: Workplace, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(workplace.base, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.3.mlp.down_proj.weight"))
    weights[name][0, 0] = float("nan")  # above the area: only the generation loss sees it
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    flags = workplace.train_flags(tmp_path / "out", "--final-estimation", "false")
    flags[flags.index("--model") + 1] = str(broken)
    stopped = shifcon(*flags)
    assert stopped.code == 1
    assert "step 1" in stopped.text
    assert "loss_generation" in stopped.text
    assert not (tmp_path / "out" / "shifcon.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process; POSIX only")
def test_ctrl_c_saves_and_exits_130(workplace: Workplace, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = workplace.train_flags(output, "--max-steps", "100000", "--logging-steps", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "shifcon_fast.cli", *flags],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "loss_generation" in line:  # training is under way
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 130, text
    assert "interrupted" in text
    saved = list(output.glob("checkpoint-*"))
    assert len(saved) == 1
    step = int(saved[0].name.rpartition("-")[2])
    resumed = shifcon(*workplace.train_flags(output, "--max-steps", str(step + 1), "--resume"))
    assert resumed.code == 0, resumed.text
    assert f"{step + 1} steps" in resumed.text
