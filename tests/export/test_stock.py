"""``shifcon export`` on a run, and what it wrote in a process that cannot import this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from shifcon_fast.cli import app
from shifcon_fast.training.run.run_folder import RunState, save_run

STOCK = Path(__file__).with_name("stock.py")
ZH = "zh%2FHans%3Ax"


def export(*arguments: object) -> tuple[int, str]:
    """Exit code and everything printed, on one line."""
    result = CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def model(attached: Callable[..., Any], tiny_checkpoint: Path) -> Any:
    return attached(AutoModelForCausalLM.from_pretrained(tiny_checkpoint))


@pytest.fixture(scope="module")
def run(model: Any, word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, model, RunState(handle=model.shifcon, tokenizer=word_tokenizer))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that stock programs load."""
    folder = tmp_path_factory.mktemp("exported")
    code, text = export(run, "--to", "peft", "--output", folder / "adapters")
    assert code == 0, text
    assert f"{folder}/adapters/{ZH}: the shift moves logits by up to" in text
    code, text = export(run, "--to", "merged", "--language", "sw", "--output", folder / "merged")
    assert code == 0, text
    return folder


@pytest.fixture(scope="module")
def answers(exported: Path, run: Path, tiny_checkpoint: Path, tokens: Tensor) -> dict[str, Tensor]:
    """What the stock process computes."""
    base = str(tiny_checkpoint)
    adapters = {
        "sw": str(exported / "adapters" / "sw"),
        "zh": str(exported / "adapters" / ZH),
        "run": str(run),
    }
    question = {
        "tokens": tokens.tolist(),
        "models": {
            "peft": {"base": base, "adapters": {"sw": adapters["sw"]}},
            "first rows": {"base": base, "adapters": adapters, "rows": ["sw", "zh", "__base__"]},
            "other rows": {"base": base, "adapters": adapters, "rows": ["run", "__base__", "sw"]},
            "base": {"base": base},
            "merged": {"base": str(exported / "merged" / "sw")},
        },
    }
    asked, answered = exported / "question.json", exported / "answers.safetensors"
    asked.write_text(json.dumps(question))
    command = [sys.executable, "-P", str(STOCK), str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(answered)


@pytest.mark.parametrize("answer", ["peft", "merged"])
def test_an_export_is_loaded_without_our_code(
    *, answer: str, model: Any, answers: dict[str, Tensor], oracle: Callable[..., Any], tokens: Tensor
) -> None:
    oracle(model, "sw", tokens).check(answers[answer])


def test_a_mixed_batch_of_peft_takes_languages_the_pivot_and_the_base(
    model: Any, answers: dict[str, Tensor], oracle: Callable[..., Any], tokens: Tensor
) -> None:
    rows = {"sw": oracle(model, "sw", tokens), "zh": oracle(model, "zh/Hans:x", tokens)}
    rows["run"] = oracle(model, None, tokens)  # the pivot's rows take the adapter of the run as it is
    for answer, names in (("first rows", ["sw", "zh", None]), ("other rows", ["run", None, "sw"])):
        for row, name in enumerate(names):
            if name is None:
                assert torch.equal(answers[answer][row], answers["base"][row])
            else:
                rows[name].check(answers[answer][row], row)


def test_the_tokenizer_comes_along(exported: Path) -> None:
    for folder in (exported / "adapters" / "sw", exported / "merged" / "sw"):
        assert (folder / "tokenizer.json").is_file()


def test_vectors_are_files_and_codes_with_slashes_stay_in_the_folder(run: Path, tmp_path: Path) -> None:
    for target in ("vllm", "gguf"):
        code, text = export(run, "--to", target, "--output", tmp_path / target)
        assert code == 0, text
    assert "not checked in llama.cpp" in text
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == {
        *(
            "vllm/sw.pt",
            "vllm/sw.json",
            f"vllm/{ZH}.pt",
            f"vllm/{ZH}.json",
            "gguf/sw.gguf",
            f"gguf/{ZH}.gguf",
        ),
    }


def test_a_base_that_moved(run: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_checkpoint)
    card = json.loads((run / "shifcon.json").read_text())
    (run / "shifcon.json").write_text(json.dumps({**card, "base_model": str(tmp_path / "gone")}))
    try:
        code, text = export(run, "--to", "vllm", "--language", "sw", "--output", tmp_path / "out")
        assert code == 2
        assert "--base" in text
        code, text = export(
            run, "--to", "vllm", "--language", "sw", "--output", tmp_path / "out", "--base", moved
        )
        assert code == 0, text
    finally:
        (run / "shifcon.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], "to: got 'onnx'; wanted one of peft, merged, gguf, vllm"),
        (["--to", "merged"], "language: wanted for --to merged"),
        (["--to", "peft", "--language", "sw,fr"], "got 'fr'"),
        (["--to", "peft", "--language", "en"], "'en' is the pivot"),
        (["--to", "peft", "--without-shift"], "without_shift: wanted with --to merged"),
        (["--to", "merged", "--without-shift", "--language", "sw"], "without_shift: wanted with --to merged"),
        (["--to", "peft", "--gguf-model", "x.gguf"], "gguf_model: is for --to gguf"),
    ],
)
def test_bad_arguments_write_nothing(run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, text = export(run, *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, text = export(tiny_checkpoint, "--to", "peft", "--output", tmp_path)
    assert code == 2
    assert "is no run; wanted the folder that `shifcon train` wrote" in text


def test_runs_without_a_shift_are_merged_and_nothing_else(
    model: Any, adapted: Callable[..., Any], tiny_checkpoint: Path, word_tokenizer: Any, tmp_path: Path
) -> None:
    save_run(tmp_path / "off", model, RunState(handle=model.shifcon, shifted=False, tokenizer=word_tokenizer))
    plain = adapted(AutoModelForCausalLM.from_pretrained(tiny_checkpoint))
    save_run(tmp_path / "plain", plain, RunState(tokenizer=word_tokenizer))
    for run, message in (("off", "trained without the shift"), ("plain", "has no shift to export")):
        code, text = export(tmp_path / run, "--to", "peft", "--output", tmp_path / "out")
        assert code == 2
        assert message in text
        code, text = export(tmp_path / run, "--to", "merged", "--without-shift", "--output", tmp_path / "out")
        assert code == 0, text
        assert "unshifted: the shift moves" not in text
        assert (tmp_path / "out" / "unshifted" / "model.safetensors").is_file()
