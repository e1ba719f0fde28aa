"""The shifcon command as a user meets it: the whole way through."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shifcon_fast.cli import app
from shifcon_fast.data import parallel
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.extras import EXTRAS
from shifcon_fast.opening import open_model
from shifcon_fast.workflow import evaluate_model

Rows = list[dict[str, object]]


def test_profile_writes_a_space_an_area_and_a_picture(workplace) -> None:
    area = json.loads((workplace.folder / "space" / "area.json").read_text())
    assert 1 <= area["forward"] < area["backward"] <= 3
    assert len(area["distances"]) == 4
    assert b"<svg" in (workplace.folder / "space" / "distance.svg").read_bytes()


@pytest.mark.parametrize("command", ["profile", "train"])
def test_a_sentence_is_checked_once(
    workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
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
    made = workplace.shifcon(
        *([*profile, "--output", tmp_path] if command == "profile" else [*flags[:space], *flags[space + 2 :]])
    )
    assert made.code == 0, made.text
    assert len(checked) == len(workplace.rows) * len(workplace.rows[0])


def test_train_evaluate_report_generate(workplace, run: Path) -> None:
    log = json.loads((run / "training_log.json").read_text())["steps"]
    assert {"loss_generation", "loss_contrastive"} <= log[0].keys()

    results = workplace.folder / "results"
    evaluated = workplace.shifcon(
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

    again = workplace.shifcon(  # an earlier evaluation serves as well as a model
        *("evaluate", "--model", run, "--against", results, "--output", workplace.folder / "again"),
        *("--questions", workplace.folder / "questions.jsonl", "--max-new-tokens", "4"),
    )
    assert again.code == 0, again.text
    same = json.loads((workplace.folder / "again" / "comparison.json").read_text())["accuracy"]["sw"]
    assert (same["estimate"], same["low"], same["high"]) == (0.0, 0.0, 0.0)

    described = workplace.shifcon("card", run, "--evaluation", results)
    assert described.code == 0, described.text
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "| sw | 0.0% (" in card
    assert f"Minus {workplace.base.name}, a paired bootstrap" in card
    assert str(workplace.folder) not in card

    for folder in (results, run, workplace.folder / "space"):
        reported = workplace.shifcon("report", folder)
        assert reported.code == 0, reported.text
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert "<svg" in page or "data:image" in page
        assert 'src="http' not in page  # self-contained
        assert "<script src" not in page

    answers = workplace.shifcon(
        "generate", "--model", run, "--language", "sw", "--max-new-tokens", "3", "Ada anaishi"
    )
    assert answers.code == 0, answers.text
    found = workplace.shifcon(
        "generate", "--model", run, "--language", "auto", "--max-new-tokens", "3", "Ada anaishi"
    )
    assert found.code == 0, found.text
    assert re.search(r"'Ada anaishi': (en|de|sw|tr) \([01]\.\d\d\)", found.text), found.text


def test_prompts_of_an_evaluation_are_what_the_flags_say(workplace, tmp_path: Path) -> None:
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
    done = workplace.shifcon(*command, "--prompt-template", template, "--output", tmp_path / "file")
    assert done.code == 0, done.text
    found = json.loads((tmp_path / "file" / "evaluation.json").read_text())
    assert found["settings"]["prompt_template"]["sw"] == "Swali: {question}\nJibu:"
    assert found["settings"]["few_shot"] == {"en": 1, "sw": 1}
    assert found["settings"]["stop_strings"][0] == "\n"  # the examples answer in one line

    done = workplace.shifcon(
        *(*command, "--prompt-template", r"Q: {question}\nA:", "--stop", r"\nQ:", "--stop", "?"),
        *("--output", tmp_path / "text", "--against", tmp_path / "file"),
    )
    assert done.code == 0, done.text
    assert "note: the two differ in prompt_template: they were not asked the same" in done.text
    settings = json.loads((tmp_path / "text" / "evaluation.json").read_text())["settings"]
    assert settings["prompt_template"] == "Q: {question}\nA:"
    assert settings["stop_strings"] == ["\nQ:", "?"]
    refused = workplace.shifcon(*command, "--prompt-template", "Q:", "--output", tmp_path / "refused")
    assert refused.code == 2
    assert "wanted a text with {question} in it" in refused.text


def test_a_yaml_file_and_flags_make_the_same_run(workplace, run: Path) -> None:
    flags = workplace.train_flags(
        workplace.folder / "from-yaml", "--quantization", "nf4", "--save-steps", "2"
    )
    names = [flag[2:].replace("-", "_") for flag in flags[1::2]]
    lines = dict(zip(names, flags[2::2], strict=True)) | {"max_steps": "1"}
    file = workplace.write("run.yaml", "".join(f"{name}: {value}\n" for name, value in lines.items()))
    made = workplace.shifcon("train", "--config", file, "--max-steps", "3")
    assert made.code == 0, made.text
    ours = load_file(workplace.folder / "from-yaml" / "adapter_model.safetensors")
    theirs = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("used", [True, False])
def test_prompts_are_joined_as_in_training(workplace, tmp_path: Path, used: bool) -> None:
    base = tmp_path / "chat-model"
    shutil.copytree(workplace.base, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    made = workplace.shifcon(
        *workplace.train_flags(tmp_path / "run", "--model", str(base), "--use-chat-template", str(used))
    )
    assert made.code == 0, made.text
    _, tokenizer = open_model(str(tmp_path / "run"))
    assert (tokenizer.chat_template == template) is used
    assert (tokenizer.chat_template is None) is not used


@pytest.mark.parametrize(("flags", "in_4bit"), [((), False), (("--quantization", "nf4"), True)])
def test_a_run_is_evaluated_in_the_precision_it_was_trained_in(
    workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    in_4bit: bool,
) -> None:
    made = workplace.shifcon(*workplace.train_flags(tmp_path / "run", "--max-steps", "1"))
    assert made.code == 0, made.text
    seen = []

    def measure(model: Any, *args: Any, **settings: Any) -> EvaluationResult:
        seen.append(bool(getattr(model.get_base_model(), "is_loaded_in_4bit", False)))
        return evaluate(model, *args, **settings)

    monkeypatch.setattr(evaluate_model, "measure", measure)
    evaluated = workplace.shifcon(
        *("evaluate", "--model", tmp_path / "run", "--output", tmp_path / "results", *flags),
        *("--questions", workplace.folder / "questions.jsonl", "--max-new-tokens", "1"),
    )
    assert evaluated.code == 0, evaluated.text
    assert seen == [in_4bit]


def test_a_plain_model_ends_answers_where_its_template_ends_a_turn(
    workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
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


def test_two_models_are_never_in_memory(workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[weakref.ref[torch.nn.Module]] = []

    def opened(name: str, **options: Any) -> tuple[Any, Any]:
        assert all(weight() is None for weight in weights), "the first is still there"
        model, tokenizer = open_model(name, **options)
        weights.append(weakref.ref(next(model.parameters())))
        return model, tokenizer

    monkeypatch.setattr(evaluate_model, "open_model", opened)
    monkeypatch.setattr(evaluate_model.gc, "collect", lambda: 0)  # nor does it take the garbage collector
    made = workplace.shifcon(*workplace.train_flags(tmp_path / "run", "--max-steps", "1"))
    assert made.code == 0, made.text
    evaluated = workplace.shifcon(
        *("evaluate", "--model", tmp_path / "run", "--against", workplace.base, "--quantization", "none"),
        *("--output", tmp_path / "results", "--parallel", workplace.folder / "parallel.jsonl"),
    )
    assert evaluated.code == 0, evaluated.text
    assert len(weights) == 2


def test_doctor_names_every_operator_and_its_backend(
    workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIFCON_CACHE", str(tmp_path))  # not a measurement beside other tests
    told = workplace.shifcon("doctor", "--json")
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
    assert {name: each["chosen"] in ("float32", "bfloat16") for name, each in found["dtype"].items()} == {
        "nf4": True,
        "none": True,
    }
    assert found["extras"] == dict.fromkeys(EXTRAS, "installed")
    assert found["versions"]["torch"] == torch.__version__
    assert "operators" in workplace.shifcon("doctor").text


@pytest.mark.parametrize(
    "command", [each.name or each.callback.__name__ for each in app.registered_commands if each.callback]
)
def test_every_command_explains_itself(workplace, command: str) -> None:
    helped = workplace.shifcon(command, "--help")
    assert helped.code == 0
    assert len(helped.text) > 200


def test_help_all_lists_every_field(workplace) -> None:
    listed = workplace.shifcon("train", "--help-all").text
    assert all(
        f"--{flag} " in listed for flag in ("w-mcl", "lora-r", "vectors", "gradient-accumulation-steps")
    )


def test_data_as_people_have_it(workplace, tmp_path: Path) -> None:
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
    refused = workplace.shifcon("profile", *flags)
    assert refused.code == 2
    assert "pivot: got 'en'" in refused.text
    assert "has deu_Latn, swh_Latn; choose one of them with --pivot" in refused.text
    made = workplace.shifcon("profile", *flags, "--pivot", "de")
    assert made.code == 0, made.text
    assert (
        "languages deu_Latn, swh_Latn; other fields, left out: id, src. If src are languages too" in made.text
    )
    assert json.loads((tmp_path / "out" / "language_space.json").read_text())["pivot"] == "deu_Latn"
    measured = workplace.shifcon(
        "evaluate", *flags[:-1], tmp_path / "results", "--pivot", "de", "--languages", "sw"
    )
    assert measured.code == 0, measured.text
    result = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert (result["pivot"], list(result["perplexity"]["unshifted"])) == ("de", ["de", "sw"])


def test_a_run_whose_base_moved(workplace, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    card = json.loads((moved / "shifcon.json").read_text())
    (moved / "shifcon.json").write_text(json.dumps({**card, "base_model": str(tmp_path / "gone")}))
    flags = ("generate", "--model", moved, "--language", "swh_Latn", "--max-new-tokens", "2", "Ada")
    refused = workplace.shifcon(*flags)
    assert (refused.code, "pass base= (--base)" in refused.text) == (2, True)
    assert workplace.shifcon(*flags, "--base", workplace.base).code == 0


def test_doctor_predicts_a_step(workplace) -> None:
    flags = (
        "doctor",
        "--model",
        workplace.base,
        "--batch",
        "2",
        "--length",
        "16",
        "--contrastive-batch",
        "3",
    )
    told = workplace.shifcon(*flags, "--forward", "1", "--backward", "3", "--dtype", "float32")
    assert told.code == 0, told.text
    for part in ("generation", "head and loss", "contrastive", "optimizer", "MiB of tensors", "f, b = 1, 3"):
        assert part in told.text
    found = json.loads(workplace.shifcon(*flags, "--quantization", "none", "--json").text)
    assert found["quantization"] == "none"
    assert found["peak"] > found["bytes"]["weights"] > 0
    for wrong, said in (
        (("--batch", "0"), "batch: got 0; wanted 1 or more"),
        (("--forward", "1"), "forward, backward: got 1 and None; wanted both, or neither"),
    ):
        refused = workplace.shifcon(*flags, *wrong)
        assert refused.code == 2
        assert said in refused.text
