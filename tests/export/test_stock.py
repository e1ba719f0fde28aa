"""Exported folders in a process that cannot import this package."""

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

from shifcon_fast.export.peft_alone import export_peft

STOCK = Path(__file__).with_name("stock.py")


@pytest.fixture(scope="module")
def model(attached: Callable[..., Any], tiny_checkpoint: Path) -> Any:
    return attached(AutoModelForCausalLM.from_pretrained(tiny_checkpoint))


@pytest.fixture(scope="module")
def answers(
    model: Any, tiny_checkpoint: Path, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What the stock process computes from everything that is exported here."""
    folder = tmp_path_factory.mktemp("stock")
    export_peft(model, "sw", folder / "sw")
    export_peft(model, "zh/Hans:x", folder / "zh")
    model.save_pretrained(folder / "trained")
    base = str(tiny_checkpoint)
    adapters = {name: str(folder / name) for name in ("sw", "zh", "trained")}
    question = {
        "tokens": tokens.tolist(),
        "models": {
            "peft": {"base": base, "adapters": {"sw": adapters["sw"]}},
            "first rows": {"base": base, "adapters": adapters, "rows": ["sw", "zh", "__base__"]},
            "other rows": {"base": base, "adapters": adapters, "rows": ["trained", "__base__", "sw"]},
            "base": {"base": base},
        },
    }
    (folder / "question.json").write_text(json.dumps(question))
    command = [sys.executable, "-P", STOCK, folder / "question.json", folder / "answers.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "answers.safetensors")


def test_an_adapter_is_loaded_without_our_code(
    model: Any, answers: dict[str, Tensor], oracle: Callable[..., Any], tokens: Tensor
) -> None:
    oracle(model, "sw", tokens).check(answers["peft"])


def test_a_mixed_batch_of_peft_takes_languages_the_pivot_and_the_base(
    model: Any, answers: dict[str, Tensor], oracle: Callable[..., Any], tokens: Tensor
) -> None:
    rows = {"sw": oracle(model, "sw", tokens), "zh": oracle(model, "zh/Hans:x", tokens)}
    rows["trained"] = oracle(model, None, tokens)  # the pivot's rows take the adapter as it was trained
    for answer, names in (("first rows", ["sw", "zh", None]), ("other rows", ["trained", None, "sw"])):
        for row, name in enumerate(names):
            if name is None:
                assert torch.equal(answers[answer][row], answers["base"][row])
            else:
                rows[name].check(answers[answer][row], row)
