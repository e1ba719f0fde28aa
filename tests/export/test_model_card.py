"""Model cards: what they say of loading is true, and nothing that a user names breaks or leaks."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer
from typer.testing import CliRunner

import shifcon_fast as sf
from shifcon_fast.cli import app
from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.card_tables import evaluation_tables, last_name
from shifcon_fast.evaluation.comparison import PairedComparison
from shifcon_fast.evaluation.exact_match import Outcome
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.export.model_card import README, CardOptions, is_written_by_hand, model_card
from shifcon_fast.export.support import supported_targets
from shifcon_fast.markdown import block, code, prose, table
from shifcon_fast.training.run.run_card import read_card
from shifcon_fast.training.run.run_folder import RunState, save_run
from shifcon_fast.training.run.shift_file import read_shift
from shifcon_fast.training.weights.quantization import load_quantized

# Names as a file system takes them and Markdown, YAML, Python and a shell do not.
BASE, RUN = """it's `a` "base": #1 | x""", "run *of* [mine] | `r` & $HOME"
STEPS = [
    {"step": n, "loss": 2.0 - n / 2, "loss_generation": 1.5 - n / 2, "loss_contrastive": 0.5}
    for n in (1, 2, 3)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, attached: Any) -> Path:
    """A folder with a base model and a run on it, both of awkward names."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_checkpoint, folder / BASE)
    base = load_quantized(folder / BASE, None, "none")
    model = attached(base)
    tokenizer = AutoTokenizer.from_pretrained(folder / BASE)
    save_run(folder / RUN, model, RunState(model.shifcon, tokenizer=tokenizer, log=STEPS))
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run in a working folder where the base model is at hand too."""
    shutil.copytree(place / RUN, tmp_path / RUN)
    (tmp_path / BASE).symlink_to(place / BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / RUN


def shifcon(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def blocks(card: str, language: str) -> Iterator[str]:
    """The blocks of code of a card, as Markdown ends them: at a fence as long as theirs."""
    for _, text in re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL):
        yield text


def test_the_card_of_a_saved_run_replaces_peft_s(run: Path, place: Path) -> None:
    card = ModelCard.load(run / README)
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": ["en", "sw"],
        "tags": ["lora", "transformers", "shifcon"],
    }
    text = card.content
    assert "More Information Needed" not in text
    assert str(place) not in text
    assert "/tmp" not in text
    for said in ("boundary 2", "boundary\n3", "alpha 0.5", "recipe stable", "rank 4", "| step | loss |"):
        assert re.sub(r"\s", " ", said) in re.sub(r"\s", " ", text), said
    shift = read_shift(run, read_card(run))
    assert shift is not None
    doses = " | ".join(f"{each:.2f}" for each in shift.dose("sw"))
    assert f"| sw | {doses} | 2 |" in text
    assert "| zh/Hans:x |" in text


def test_what_it_says_of_loading_is_true(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of Python runs, after the commands of the shell that write what it loads."""
    text = (run / README).read_text()
    python = list(blocks(text, "python"))
    load, plain, merged = python
    names: dict[str, Any] = {}
    exec(load, names)
    model = names["model"]
    assert model.shifcon.language == "sw"
    assert len(capsys.readouterr().out.splitlines()) >= 1
    commands = [line for each in blocks(text, "sh") for line in each.splitlines()]
    exports = [shlex.split(line) for line in commands if line.startswith("shifcon export")]
    assert [each[each.index("--to") + 1] for each in exports] == ["peft", "merged", "merged", "gguf", "vllm"]
    ids = torch.randint(3, 100, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
        for arguments, snippet in zip(exports[:2], (plain, merged), strict=True):
            shifcon(*arguments[1:])
            loaded: dict[str, Any] = {}
            exec(snippet, loaded)
            torch.testing.assert_close(loaded["model"].eval()(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    assert shlex.split(next(line for line in commands if "lm-eval" in line))[3] == (
        f"pretrained={RUN},language=sw,base={BASE}"
    )


def test_the_command_adds_what_a_run_does_not_know(run: Path, tmp_path: Path) -> None:
    result(run).save(tmp_path / "results")
    said = shifcon(
        *("card", run, "--evaluation", tmp_path / "results", "--license", "apache-2.0"),
        *(
            "--base-model",
            "org/base",
            "--repository",
            "me/run-sw",
            "--dataset",
            "org/data",
            "--tag",
            "kiswahili",
        ),
    )
    assert "written to" in said
    card = ModelCard.load(run / README)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": ["en", "sw"],
        "license": "apache-2.0",
        "datasets": ["org/data"],
        "tags": ["base_model:adapter:org/base", "lora", "transformers", "shifcon", "kiswahili"],
    }
    assert "# run-sw\n" in card.content
    assert "![loss.png](loss.png)" in card.content
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert 'folder = snapshot_download("me/run-sw")' in card.content
    assert 'sf.load(folder, base="org/base")' in card.content
    assert "hf download me/run-sw --local-dir run-sw" in card.content
    assert BASE not in card.content
    assert "| sw | 50.0% (" in card.content


def result(run: Path, **changes: Any) -> EvaluationResult:
    card = read_card(run)
    assert card["area"] is not None
    outcomes = [Outcome(n, "sw", "?", "1", "1", "1", n == 0, None) for n in range(2)]
    found = EvaluationResult(
        model=f"/home/somebody/{RUN}",
        pivot="en",
        area={**card["area"], "alpha": card["alpha"], "recipe": card["recipe"]},
        outcomes=[*outcomes, Outcome(0, "zh|Hans", "?", "2", "1", "2", False, True)],
        settings={
            "questions": "/home/somebody/secret/mgsm.jsonl",
            "max_new_tokens": 8,
            "prompt_template": "```\n{question}\n````\n---\n| a | b |",
            "few_shot": {"sw": 2},
        },
        versions={"torch": "2.13.0"},
    )
    return replace(found, **changes)


def test_an_evaluation_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    other = {"forward": 1, "backward": 3, "alpha": 0.5, "recipe": "stable"}
    result(run, area=other).save(tmp_path / "results")
    before = (run / README).read_text()
    refused = CliRunner().invoke(app, ["card", str(run), "--evaluation", str(tmp_path / "results")])
    assert refused.exit_code == 2
    assert "evaluation: " in refused.output
    assert (run / README).read_text() == before


def test_a_card_that_a_person_wrote_stays(run: Path, attached: Callable[..., Any]) -> None:
    assert not is_written_by_hand(run / README)
    (run / README).write_text("# Mine\n")
    model = sf.load(run)
    save_run(run, model, RunState(model.shifcon))
    assert (run / README).read_text() == "# Mine\n"
    refused = CliRunner().invoke(app, ["card", str(run)])
    assert (refused.exit_code, (run / README).read_text()) == (2, "# Mine\n")
    assert "--overwrite" in refused.output
    shifcon("card", run, "--overwrite")
    assert not is_written_by_hand(run / README)


def test_tables_hold_whatever_names_and_prompts_are(run: Path) -> None:
    interval = Interval(0.25, -0.1, 0.6)
    comparison = PairedComparison("a", "/home/somebody/base|line", {"sw": interval}, {"sw": interval})
    text = evaluation_tables(result(run), comparison)
    assert "somebody" not in text
    assert "mgsm.jsonl" in text
    assert r"| zh\|Hans | 0.0% (" in text
    assert r"Minus base\|line" in text
    assert "| sw | +25.0 (-10.0 … +60.0, within noise) | +0.250 (-0.100 … +0.600, within noise) |" in text
    (prompt,) = blocks(text, "text")
    assert prompt == result(run).settings["prompt_template"]
    for rows in re.findall(r"(?:^\|.*\|$\n?)+", text.replace(prompt, ""), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}) == 1


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("org/model", "org/model"),
        ("/home/me/models/base", "base"),
        ("C:\\models\\base\\", "base"),
        ("../data/dev.jsonl", "dev.jsonl"),
        ("data/dev.jsonl", "dev.jsonl"),
        ("given in memory", "given in memory"),
    ],
)
def test_paths_are_called_by_their_ends(source: str, shown: str) -> None:
    assert last_name(source) == shown


def minimal(**changes: Any) -> dict[str, Any]:
    """A card of a run as ``read_card`` returns it, as far as model cards look."""
    run = {
        "base_model": "org/base",
        "fingerprint": {"model_type": "llama"},
        "quantization": "nf4",
        "dtype": "float32",
        "shift": False,
        "pivot": None,
        "languages": [],
        "training": {"w_gen": 1.0},
        "versions": {"torch": "2.13.0"},
    }
    return {**run, **changes}


def test_a_run_without_a_shift_says_so() -> None:
    text = model_card("plain", minimal(), None, {"peft_type": "LORA"}).content
    assert "without the shift" in text
    assert "shifcon export" not in text
    assert "model.shifcon" not in text
    (load,) = blocks(text, "python")
    compile(load, "card", "exec")
    assert "sf.load(folder)" in load


def test_metadata_is_what_the_hub_takes(caplog: pytest.LogCaptureFixture) -> None:
    """Norwegian is no boolean, FLORES' codes are ISO 639, and a name that is no language is left out."""
    languages = ["no", "swh_Latn", "swh", "zh-Hant", "ace_Latn", "klingonish", "a|b"]
    card = model_card("x", minimal(languages=languages, pivot="no"), None, {"peft_type": "LORA"})
    assert ModelCard(card.content).data.language == ["no", "sw", "zh", "ace"]
    assert "leaves out 'klingonish', 'a|b'" in caplog.text
    data = ModelCard(card.content).data
    assert data.base_model == "org/base"
    assert "base_model:adapter:org/base" in data.tags
    for wrong in ("/home/me/base", "a/b/c", "org/my base", 'org/"x"'):
        with pytest.raises(ValueError, match=r"wanted the id of a Hub repository"):
            CardOptions(base_model=wrong)


def test_exports_are_those_that_the_run_can_take(run: Path) -> None:
    shift = read_shift(run, read_card(run))
    assert shift is not None
    lora = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    assert supported_targets("llama", shift, lora) == ("peft", "merged", "gguf", "vllm")
    assert supported_targets("qwen3", shift, lora) == ("peft", "gguf", "vllm")
    assert supported_targets("gemma3_text", shift, lora) == ("gguf", "vllm")
    assert supported_targets("unheard_of", shift, lora) == ("gguf", "vllm")
    assert supported_targets("llama", shift, {**lora, "use_dora": True}) == ("merged", "gguf", "vllm")
    embedding = {**lora, "target_modules": ["q_proj", "embed_tokens"]}
    assert supported_targets("llama", shift, embedding) == ("merged", "gguf", "vllm")
    early = replace(shift, forward=1)
    assert supported_targets("llama", early, lora) == ("peft", "merged", "vllm")
    assert supported_targets("llama", replace(early, recipe="official"), lora) == ()
    assert supported_targets("llama", replace(shift, alpha=0.0), lora) == ()


def test_markdown_of_others() -> None:
    assert prose("a|b\n*c* <d> `e` [f](g) #h") == r"a\|b \*c\* \<d\> \`e\` \[f\](g) \#h"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a`") == "`` `a` ``"
    assert block("```\nx\n````\n", "py") == "`````py\n```\nx\n````\n`````"
    assert table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_it_is_made_of_the_run_s_files_alone(run: Path) -> None:
    before = (run / README).read_text()
    (run.parent / BASE).unlink()
    shifcon("card", run)
    drawn = "\n![loss.png](loss.png)\n"
    assert (run / README).read_text().replace(drawn, "") == before
    (run / "training_log.json").write_text(json.dumps({"steps": [], "evaluations": []}))
    (run / "loss.png").unlink()
    shifcon("card", run)
    assert "| step |" not in (run / README).read_text()
    assert "loss.png" not in (run / README).read_text()
