"""A model's loss without its logits: the same for every kind of head that models have, and in a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shifcon_fast.data.instructions import Instruction
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.losses.loss_without_logits import LossWithoutLogits, finish_of, loss_without_logits
from shifcon_fast.training.trainer import ShifConTrainer

IDS = torch.tensor([[5, 6, 7, 8, 9, 0], [9, 8, 7, 6, 5, 4]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9, -100], [-100, -100, -100, 6, 5, 4]])
LANGUAGES = torch.tensor([1, -1])
QUICK = {"w_mcl": 0.0, "w_gen": 1.0, "parallel": None, "max_steps": 2}

MODELS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},  # and tied
    "gemma3_text": {},
    "cohere2": {"logit_scale": 0.3},
    "granite": {},  # divides by 2
    "gpt2": {},
    "phi3": {},
}


def both(model: Any, **inputs: Any) -> tuple[Any, Any, Any]:
    """The plain output, the chunked one, and what was found; with the gradients of the parameters."""
    outputs = []
    chunked = LossWithoutLogits(model)
    for engaged in (False, True):
        model.zero_grad()
        if engaged:
            with chunked.engaged(LANGUAGES) as found:
                output = model(IDS, labels=LABELS, **inputs)
        else:
            output = model(IDS, labels=LABELS, **inputs)
        if output.loss.requires_grad:
            output.loss.backward()
        grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        outputs.append((output, grads))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model.get_output_embeddings()._forward_pre_hooks
    return *outputs, found


@pytest.mark.parametrize("items", [None, torch.tensor(11)])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_the_models_own(
    tiny_model: Callable[..., Any], name: str, items: Tensor | None
) -> None:
    model = tiny_model(name, **MODELS[name]).train()
    model.get_input_embeddings().weight.requires_grad_(True)
    inputs = {} if items is None else {"num_items_in_batch": items}
    (plain, expected), (chunked, got), found = both(model, **inputs)
    assert found.problem is None
    assert chunked.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    assert got.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-6)
    right = functional.cross_entropy(
        plain.logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="none"
    )
    assert found.losses.learnt.tolist() == (LABELS[:, 1:] != -100).tolist()
    torch.testing.assert_close(found.losses.nll.flatten(), right.detach(), rtol=1e-4, atol=1e-5)


def test_the_head_is_given_contiguous_hidden_states(tiny_model: Callable[..., Any]) -> None:
    """Of a slice, a CPU copies the matrix of the head for every row, in bfloat16."""
    model = tiny_model("gemma3_text").train()
    seen: list[bool] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].is_contiguous())
    )
    chunked = LossWithoutLogits(model)
    for _ in range(2):  # the first compares logits, the second does not
        with chunked.engaged(LANGUAGES) as found:
            model(IDS, labels=LABELS)
        assert found.problem is None
    assert len(seen) > 2
    assert all(seen)


def test_only_learnt_tokens_meet_the_head_after_the_first_batch(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").train()
    chunked = LossWithoutLogits(model)
    rows: list[int] = []
    for _ in range(2):
        rows.clear()
        counter = model.lm_head.register_forward_hook(
            lambda module, args, output: rows.append(output.shape[:-1].numel())
        )
        with chunked.engaged(None) as found:
            output = model(IDS, labels=LABELS)
        counter.remove()
        assert found.losses is None
    assert rows == [0, int((LABELS[:, 1:] != -100).sum())]
    assert output.logits.shape == (2, 0, 128)


def test_a_head_that_is_not_what_its_config_says_is_found_out(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("granite").train()
    chunked = LossWithoutLogits(model)
    model.config.logits_scaling = 3.0  # its forward reads it at each call
    with chunked.engaged(LANGUAGES) as found:
        assert model(IDS, labels=LABELS).loss.isnan()
    assert found.problem is not None
    assert "not those of its head" in found.problem
    plain = model(IDS, labels=LABELS)
    assert plain.loss.isfinite()
    assert plain.logits.shape == (2, 6, 128)


def test_labels_that_are_shifted_already_are_left_to_the_model(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").train()
    with LossWithoutLogits(model).engaged(LANGUAGES) as found:
        output = model(IDS, labels=LABELS, shift_labels=functional.pad(LABELS[:, 1:], (0, 1), value=-100))
    assert output.loss.item() == pytest.approx(model(IDS, labels=LABELS).loss.item())
    assert found.problem == "the labels are shifted already, or there are none"


def test_the_config_says_what_follows_the_head() -> None:
    assert finish_of(SimpleNamespace(logit_scale=0.0625)) == (0.0625, None)
    assert finish_of(SimpleNamespace(model_type="granite", logits_scaling=8.0)) == (0.125, None)
    assert finish_of(SimpleNamespace(model_type="hyperclovax", logits_scaling=8.0)) == (8.0, None)
    assert finish_of(SimpleNamespace(lm_head_multiplier=0.5, final_logit_softcapping=30)) == (0.5, 30.0)
    assert finish_of(SimpleNamespace(logit_scale=None)) == (1.0, None)


# --- in a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_is_the_same_on_and_off(
    make_trainer: Callable[..., ShifConTrainer],
    instructions: list[Instruction],
    tmp_path: Path,
    quantization: str,
) -> None:
    logs = []
    for chunked in ("on", "off"):
        trainer = make_trainer(
            folder=chunked,
            chunked_cross_entropy=chunked,
            quantization=quantization,
            gradient_accumulation_steps=2,
            eval_dataset=instructions[:7],
            per_device_eval_batch_size=3,
            eval_strategy="steps",
            eval_steps=1,
            **{**QUICK, "parallel": None},
        )
        trainer.train()
        timeless = ("runtime", "per_second", "flos")
        logs.append(
            [
                {name: value for name, value in row.items() if not any(each in name for each in timeless)}
                for row in trainer.state.log_history
            ]
        )
        card = json.loads((tmp_path / chunked / "shifcon.json").read_text())
        assert card["training"]["chunked_cross_entropy"] == chunked
    assert len(logs[0]) == len(logs[1]) >= 4
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert "loss_generation_sw" in logs[0][0]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor needs the logits"),
        ({"torch_compile": True}, r"torch\.compile \(torch_compile\)"),
    ],
)
def test_what_needs_the_logits_is_said_or_refused(
    make_trainer: Callable[..., ShifConTrainer],
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    why: str,
) -> None:
    trainer = make_trainer(**settings, **QUICK)
    assert trainer._without_logits is None
    said = f"chunked_cross_entropy: the model's own loss is used, with all its logits: {why}"
    assert re.search(said, caplog.text)
    with pytest.raises(ValueError, match=f"chunked_cross_entropy: got on, but {why}"):
        make_trainer(chunked_cross_entropy="on", **settings, **QUICK)
    caplog.clear()
    make_trainer(chunked_cross_entropy="off", **settings, **QUICK)
    assert "chunked_cross_entropy" not in caplog.text


def test_predictions_and_outputs_have_their_logits(
    make_trainer: Callable[..., ShifConTrainer],
    instructions: list[Instruction],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(eval_dataset=instructions[:5], per_device_eval_batch_size=5, **QUICK)
    trainer.evaluate()
    assert "chunked_cross_entropy" not in caplog.text
    predicted = trainer.predict(instructions[:5])
    assert "this evaluation makes all logits, since its predictions are asked for" in caplog.text
    assert predicted.predictions.shape[0] == 5
    assert predicted.predictions.shape[1] > 2
    losses = trainer.evaluate()
    assert losses["eval_loss"] == pytest.approx(predicted.metrics["test_loss"], rel=1e-5)
    assert losses["eval_loss_sw"] == pytest.approx(predicted.metrics["test_loss_sw"], rel=1e-5)
    batch = next(iter(trainer.get_eval_dataloader()))
    _, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


def test_a_model_that_hides_its_logits_goes_on_with_its_own_loss(
    make_trainer: Callable[..., ShifConTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(**QUICK)
    trainer.model.get_base_model().config.logit_scale = 0.5  # which a Llama does not heed
    trainer._without_logits = trainer._make_loss_without_logits()
    trainer.train()
    assert "the model's own loss is used, with all its logits: the model's logits are not" in caplog.text
    log = trainer.state.log_history[0]
    assert log["loss_generation"] > 0
    assert "loss_generation_en" in log


@pytest.mark.parametrize(("given", "meant"), [(True, "on"), ("False", "off"), ("AUTO", "auto")])
def test_what_yaml_makes_of_on_and_off(tmp_path: Path, given: Any, meant: str) -> None:
    arguments = ShifConArguments(output_dir=str(tmp_path), report_to="none", chunked_cross_entropy=given)
    assert arguments.chunked_cross_entropy == meant


def test_other_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chunked_cross_entropy: got 'fused'; wanted one of auto, on, off"):
        ShifConArguments(output_dir=str(tmp_path), report_to="none", chunked_cross_entropy="fused")


@pytest.mark.parametrize("wrap", ["function", "method"])
def test_a_model_that_is_compiled_already_keeps_its_own_loss(
    tiny_model: Callable[..., Any], caplog: pytest.LogCaptureFixture, wrap: str
) -> None:
    model = tiny_model("llama")
    arguments: Any = SimpleNamespace(
        chunked_cross_entropy="auto",
        use_liger_kernel=False,
        label_smoothing_factor=0.0,
        torch_compile=False,
        n_gpu=0,
        liger_kernel_config=None,
    )
    assert loss_without_logits(arguments, model, own_loss=None) is not None
    model.model.layers[0].compile()  # a block of its own does not matter
    assert loss_without_logits(arguments, model, own_loss=None) is not None
    if wrap == "function":
        model = torch.compile(model)
    else:
        model.compile()
    assert loss_without_logits(arguments, model, own_loss=None) is None
    assert "torch.compile" in caplog.text
