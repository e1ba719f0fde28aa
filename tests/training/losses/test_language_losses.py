"""The generation loss by language: exact over mixed batches, accumulation, evaluation sets and processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from shifcon_fast.data.instructions import Instruction
from shifcon_fast.training.batches.instruction_data import InstructionCollator
from shifcon_fast.training.losses import language_losses
from shifcon_fast.training.losses.language_losses import LanguageLosses, TokenLosses, token_losses
from shifcon_fast.training.trainer import ShifConTrainer

QUICK = {"w_mcl": 0.0, "w_gen": 1.0, "parallel": None}
STILL = {**QUICK, "learning_rate": 0.0, "lr_scheduler_type": "constant"}  # every step sees the same model


def naive(trainer: ShifConTrainer, rows: Any, *, shifted: bool = True) -> dict[str, tuple[float, int]]:
    """Language → summed loss and number of its tokens, one row at a time, from the model's logits."""
    collator = InstructionCollator(trainer.processing_class)
    sums: dict[str, tuple[float, int]] = {}
    for row in rows:
        batch = collator([row])
        labels = batch.pop("labels")
        name = trainer._data.languages[int(batch["language_ids"])]
        if not shifted:
            batch.pop("language_ids")
        with torch.no_grad():
            logits = trainer.model(**batch).logits[0, :-1].double()
        loss = functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
        before, tokens = sums.get(name, (0.0, 0))
        sums[name] = before + float(loss), tokens + int((labels[0, 1:] != -100).sum())
    return sums


def test_means_are_over_a_languages_tokens_since_the_last_log_line(
    make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction], tmp_path: Path
) -> None:
    longer = [
        Instruction.single("sw", "Ada", "anaishi Roma na ana paka mwekundu"),
        Instruction.single("de", "Ben", "isst Brot"),
    ]
    rows = [*instructions[:9], *longer, *instructions[9:14]]
    trainer = make_trainer(
        train_dataset=rows,
        max_steps=2,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        logging_steps=2,
        logging_first_step=False,
        train_sampling_strategy="sequential",
        **STILL,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    sums = naive(trainer, trainer.train_dataset)
    assert sums.keys() == {"en", "de", "sw", "tr"}
    for language, (loss, tokens) in sums.items():
        assert log[f"loss_generation_{language}"] == pytest.approx(loss / tokens, rel=1e-5)
    written = json.loads((tmp_path / "run" / "training_log.json").read_text())["steps"][0]
    assert {name: written[name] for name in log if name.startswith("loss")} == {
        name: value for name, value in log.items() if name.startswith("loss")
    }


def test_the_languages_of_one_step_make_up_its_loss(
    make_trainer: Callable[..., ShifConTrainer],
) -> None:
    trainer = make_trainer(max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=6, **QUICK)
    batches: list[Any] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or batches[-1]
    trainer.train()
    log = trainer.state.log_history[0]
    tokens = dict.fromkeys(range(4), 0)
    for batch in batches[:2]:
        for language_id, labels in zip(batch["language_ids"].tolist(), batch["labels"], strict=True):
            tokens[language_id] += int((labels[1:] != -100).sum())
    names = trainer._data.languages
    total = sum(log[f"loss_generation_{names[each]}"] * count for each, count in tokens.items() if count)
    assert log["loss_generation"] == pytest.approx(total / sum(tokens.values()), rel=1e-6)


def test_evaluation_sets_have_losses_by_language(
    make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction]
) -> None:
    sets = {"all": instructions[:7], "sw": [each for each in instructions if each.language == "sw"]}
    trainer = make_trainer(eval_dataset=sets, per_device_eval_batch_size=3, **QUICK)
    metrics = trainer.evaluate()
    for name, data in trainer.eval_dataset.items():
        expected = {language: loss / tokens for language, (loss, tokens) in naive(trainer, data).items()}
        found = {
            language: metrics[f"eval_{name}_loss_{language}"]
            for language in trainer._data.languages
            if f"eval_{name}_loss_{language}" in metrics
        }
        assert found == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(sets["sw"])["eval_loss_sw"] == pytest.approx(metrics["eval_sw_loss_sw"])
    assert {name for row in trainer.state.log_history for name in row if "_loss_" in name} == {
        name for name in metrics if "_loss_" in name
    } | {"eval_loss_sw"}


@pytest.mark.parametrize("with_space", [True, False])
def test_an_unshifted_run_has_them_too_and_names_the_datas_languages(
    make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction], space: Any, with_space: bool
) -> None:
    rows = [*instructions[:3], Instruction.single("pt-PT", "Ada", "Roma na")]
    settings = {} if with_space else {"space": None, "forward": None, "backward": None}
    trainer = make_trainer(
        shift=False,
        train_dataset=rows,
        eval_dataset=rows,
        max_steps=1,
        train_sampling_strategy="sequential",
        **{**STILL, **settings},
    )
    trainer.train()
    sums = naive(trainer, trainer.train_dataset, shifted=False)
    expected = {language: loss / tokens for language, (loss, tokens) in sums.items()}
    assert set(expected) == {"en", "de", "sw", "pt-PT"}
    log, metrics = trainer.state.log_history[0], trainer.evaluate()
    for language, loss in expected.items():
        assert log[f"loss_generation_{language}"] == pytest.approx(loss, rel=1e-5)
        assert metrics[f"eval_loss_{language}"] == pytest.approx(loss, rel=1e-5)


def test_metrics_are_computed_for_each_language_too(
    make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction]
) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:]
        right = prediction.predictions[:, :-1].argmax(-1) == labels
        return {"right": int(right[labels != -100].sum()), "tokens": int((labels != -100).sum())}

    trainer = make_trainer(eval_dataset=instructions[:7], per_device_eval_batch_size=3, **QUICK)
    trainer.compute_metrics = accuracy
    metrics = trainer.evaluate()
    sums = naive(trainer, trainer.eval_dataset)
    assert {language: metrics[f"eval_tokens_{language}"] for language in sums} == {
        language: tokens for language, (_, tokens) in sums.items()
    }
    assert metrics["eval_tokens"] == sum(tokens for _, tokens in sums.values())
    assert metrics["eval_right"] == sum(metrics[f"eval_right_{language}"] for language in sums)
    assert trainer.compute_metrics is accuracy


def test_they_can_be_left_out(make_trainer: Callable[..., ShifConTrainer]) -> None:
    trainer = make_trainer(language_losses=False, max_steps=1, **QUICK)
    trainer.train()
    assert [name for name in trainer.state.log_history[0] if name.startswith("loss")] == [
        "loss",
        "loss_generation",
    ]


def test_a_model_without_logits_is_said(
    make_trainer: Callable[..., ShifConTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    """As Liger's fused loss leaves them out."""
    trainer = make_trainer(max_steps=1, **QUICK)
    trainer.model.base_model.model.register_forward_hook(
        lambda module, args, output: type(output)(loss=output.loss)
    )
    trainer.train()
    assert "No losses by language: the model gives no logits" in caplog.text
    assert "loss_generation" in trainer.state.log_history[0]
    assert not any(name.startswith("loss_generation_") for name in trainer.state.log_history[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_in_chunks_are_cross_entropy(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_losses, "_CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 20, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 20, (3, 9), generator=generator).masked_fill(torch.arange(9) < 4, -100)
    nll, learnt = token_losses(logits, labels)
    expected = (
        -logits.double().log_softmax(-1)[:, :-1].gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    )
    torch.testing.assert_close(nll.double(), expected * (labels[:, 1:] != -100), rtol=1e-5, atol=1e-6)
    assert torch.equal(learnt, labels[:, 1:] != -100)
    assert not nll.requires_grad


def test_packed_rows_count_each_token_for_its_language_and_nobodys_as_other() -> None:
    losses = LanguageLosses(("en", "sw"))
    nll = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 0.0, 64.0]])
    learnt = nll > 0
    ids = torch.tensor([[0, 0, 1, 1, 1], [-1, 1, -1, -1, 0]])  # of tokens 0 … 4; token 0 is not predicted
    losses.add(losses.rows(TokenLosses(nll, learnt), ids))
    assert losses.drain(lambda sums: sums) == {"en": (1 + 64) / 2, "sw": (2 + 4 + 8 + 16) / 4, "other": 32.0}
    assert losses.drain(lambda sums: sums) == {}


def test_nothing_is_read_back_before_a_log_line() -> None:
    """On the meta device there is nothing to read: any synchronisation raises."""
    losses = LanguageLosses(("en", "sw"))
    logits = torch.empty(2, 6, 32, device="meta", dtype=torch.bfloat16)
    labels, ids = (torch.empty(shape, dtype=torch.long, device="meta") for shape in ((2, 6), (2,)))
    for each in (ids, labels):
        losses.add(losses.rows(token_losses(logits, labels), each))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        losses.drain(lambda sums: sums)
