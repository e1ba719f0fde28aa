"""TRL's DPOTrainer on an attached model: policy and reference are shifted, which is counted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import shifcon_fast as sf
from shifcon_fast.data.errors import DataError
from shifcon_fast.modeling.attach import attach
from shifcon_fast.training.dpo import ShifConDPOTrainer


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def pairs(parallel_text: dict[str, list[str]]) -> datasets.Dataset:
    rows = []
    for index in range(3):
        for language, sentences in parallel_text.items():
            prompt, _, chosen = sentences[index].rpartition(" ")
            rejected = sentences[index + 1].split()[-1]
            rows.append(
                {"lang": language, "prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
            )
    return datasets.Dataset.from_list(rows)


def settings(folder: Path, **others: Any) -> DPOConfig:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 12,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return DPOConfig(**{**defaults, **others})


@pytest.fixture
def model(load_model: Callable[..., Any], space: Any) -> Any:
    model = load_model()
    attach(model, space, 1, 3, adapter="default")
    return model


@pytest.fixture
def tokenizer(word_tokenizer: Any) -> Any:
    return copy.deepcopy(word_tokenizer)


def log_probability(model: Any, prompt: list[int], answer: list[int], language: str) -> float:
    with torch.no_grad():
        ids = torch.tensor([prompt + answer])
        logits = model(ids, language_ids=model.shifcon.language_ids(language)).logits[0].double()
    found = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return float(found[len(prompt) - 1 :].sum())


@pytest.mark.parametrize("precompute", [False, True])
def test_policy_and_reference_are_shifted_by_the_language_of_each_row(
    model: Any, tokenizer: Any, pairs: datasets.Dataset, tmp_path: Path, precompute: bool
) -> None:
    start = copy.deepcopy(model)
    handle = model.shifcon
    trainer = ShifConDPOTrainer(
        model,
        settings(tmp_path, precompute_ref_log_probs=precompute, learning_rate=1e-2, max_steps=2),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    handle.reset_engagements()
    trainer.train()
    # Two steps of policy and reference (a precomputed one ran before), at both boundaries; checkpointing runs the
    # policy's blocks once more for the gradient.
    assert {block: sites["shift"] for block, sites in handle.engagements.items() if "shift" in sites} == (
        {1: 4, 3: 4} if precompute else {1: 6, 3: 6}
    )
    first, second = (row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference, shift and all
    assert second["loss"] < first["loss"]
    # The first step's log probabilities are those of the shifted model.
    chosen = [
        log_probability(start, row["prompt_ids"], row["chosen_ids"], pairs[index]["lang"])
        for index, row in enumerate(trainer.train_dataset)
    ]
    assert first["logps/chosen"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)
    unshifted = [
        log_probability(start, row["prompt_ids"], row["chosen_ids"], "en") for row in trainer.train_dataset
    ]
    assert sum(unshifted) != pytest.approx(sum(chosen), rel=1e-3)
    # What is saved is a run, and shifts when it is loaded.
    trainer.save_model(str(tmp_path / "run"))
    loaded = sf.load(tmp_path / "run")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        expected = model.eval()(ids, language_ids=handle.language_ids("sw")).logits
        assert torch.equal(loaded(ids, language_ids=loaded.shifcon.language_ids("sw")).logits, expected)


def test_a_new_adapter_on_an_attached_model(
    load_model: Callable[..., Any], space: Any, tokenizer: Any, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    """The reference is then the model without adapters, which the shift follows as well."""
    base = load_model().unload()
    handle = attach(base, space, 1, 3)
    trainer = ShifConDPOTrainer(
        base,
        settings(tmp_path),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    handle.reset_engagements()
    trainer.train()
    assert handle.engagements[1]["shift"] == handle.engagements[3]["shift"] == 3
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_plain_trainer_takes_the_language_of_all_rows(
    load_model: Callable[..., Any], space: Any, tokenizer: Any, pairs: datasets.Dataset, tmp_path: Path
) -> None:
    model = load_model()
    handle = attach(model, space, 1, 3)
    handle.language = "sw"
    trainer = DPOTrainer(model, args=settings(tmp_path), train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    assert handle.engagements[1]["shift"] == handle.engagements[3]["shift"] == 3
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_what_would_leave_the_reference_unshifted_is_refused(  # noqa: PLR0917 - fixtures, by name
    model: Any,
    load_model: Callable[..., Any],
    tokenizer: Any,
    pairs: datasets.Dataset,
    space: Any,
    tmp_path: Path,
) -> None:
    def make(model: Any, data: datasets.Dataset = pairs, **others: Any) -> ShifConDPOTrainer:
        return ShifConDPOTrainer(
            model, settings(tmp_path), train_dataset=data, processing_class=tokenizer, **others
        )

    with pytest.raises(ValueError, match="model: it is not attached"):
        make(load_model())
    bare = load_model().unload()
    attach(bare, space, 1, 3)
    with pytest.raises(ValueError, match="ref_model: none given, and TRL would load one without the shift"):
        make(bare)
    with pytest.raises(ValueError, match="ref_model: it is not attached"):
        make(bare, ref_model=load_model().unload())
    with pytest.raises(ValueError, match="peft_config: the shift belongs to an adapter"):
        make(model, peft_config=LoraConfig())
    with pytest.raises(DataError, match=r"has .*'prompt'.*; the shift needs the language of each row"):
        make(model, pairs.remove_columns("lang"))
    frozen = load_model()
    attach(frozen, space, 1, 3, adapter="default")
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing in it is trained .* model.set_requires_grad\('default'\)"):
        make(frozen)
    frozen.set_requires_grad("default")
    make(frozen)
