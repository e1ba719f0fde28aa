"""Replay and distillation on the pivot's sentences, against plain float64 over whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shifcon_fast.modeling.attach import attach
from shifcon_fast.objective.mcl import ContrastiveBatch, mcl_loss
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.losses import pivot_keeping
from shifcon_fast.training.losses.pivot_keeping import (
    DISTILLATION,
    REPLAY,
    anchor_loss,
    base_representations,
    pivot_losses,
    pivot_representations,
)
from shifcon_fast.training.trainer import ShifConTrainer


@pytest.fixture
def batch() -> ContrastiveBatch:
    """Three pairs; the pivot's sentences have 6, 4 and 5 tokens, translations up to 7."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 70, (6, 7), generator=generator)
    attention = torch.ones(6, 7, dtype=torch.long)
    for row, length in enumerate((6, 4, 5)):
        attention[row, length:] = 0
    return ContrastiveBatch(
        input_ids=ids.masked_fill(attention == 0, 0),
        attention_mask=attention,
        pool_mask=attention.bool(),
        language_ids=torch.tensor([0, 0, 0, 2, 1, 2]),
    )


def naive(model: Any, batch: ContrastiveBatch) -> dict[str, Tensor]:
    """In the model's precision, from whole logits of one sentence at a time."""
    nll, divergences = [], []
    for ids, attention in zip(batch["input_ids"][:3], batch["attention_mask"][:3], strict=True):
        tokens = ids[attention.bool()][None]
        log_p = model(tokens).logits[0, :-1].log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            log_base = model(tokens).logits[0, :-1].log_softmax(-1)
        nll.append(functional.nll_loss(log_p, tokens[0, 1:], reduction="none"))
        divergences.append((log_base.exp() * (log_base - log_p)).sum(-1))
    return {REPLAY: torch.cat(nll).mean(), DISTILLATION: torch.cat(divergences).mean()}


@pytest.mark.parametrize("loss", [REPLAY, DISTILLATION])
def test_losses_and_gradients(
    load_model: Callable[..., Any],
    space: LanguageSpace,
    batch: ContrastiveBatch,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
) -> None:
    monkeypatch.setattr(pivot_keeping, "_LOGITS", 4 * 128)  # a few tokens at a time
    exact = load_model().double()
    expected = naive(exact, batch)[loss]
    expected.backward()
    model = load_model()
    with attach(model, space, 1, 3) as handle:
        handle.language = "sw"  # pivot sentences are not shifted all the same
        found = pivot_losses(model, batch, replay=loss == REPLAY, distillation=loss == DISTILLATION)
        assert list(found) == [loss]
        found[loss].backward()
    torch.testing.assert_close(found[loss].double(), expected.detach(), rtol=1e-4, atol=1e-5)
    wanted = {name: each.grad for name, each in exact.named_parameters() if each.grad is not None}
    assert wanted
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_base_itself_diverges_from_nothing(
    load_model: Callable[..., Any], batch: ContrastiveBatch
) -> None:
    model = load_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    found = pivot_losses(model, batch, replay=False, distillation=True)
    assert abs(found[DISTILLATION].item()) < 1e-6


def test_a_run_keeps_its_pivot_nearer_to_the_base(make_trainer: Callable[..., ShifConTrainer]) -> None:
    settings = {"max_steps": 6, "w_mcl": 0.0, "learning_rate": 3e-2}
    free, kept = (
        make_trainer(folder=name, w_distillation=weight, w_replay=weight / 100, **settings)
        for name, weight in (("free", 1e-9), ("kept", 20.0))
    )
    divergence = {}
    for name, trainer in (("free", free), ("kept", kept)):
        trainer.train()
        last = trainer.state.log_history[-2]
        divergence[name] = last["loss_distillation"]
        weights = (trainer.args.w_gen, trainer.args.w_replay, trainer.args.w_distillation)
        shares = (last["loss_generation"], last["loss_replay"], last["loss_distillation"])
        assert last["loss"] == pytest.approx(
            sum(a * b for a, b in zip(weights, shares, strict=True)), rel=1e-3
        )
    assert divergence["kept"] < 0.5 * divergence["free"]


def test_what_is_missing_is_said(make_trainer: Callable[..., ShifConTrainer]) -> None:
    with pytest.raises(ValueError, match=r"parallel: none given; wanted translations, for w_replay is 0\.5"):
        make_trainer(w_mcl=0.0, w_replay=0.5, parallel=None)
    with pytest.raises(ValueError, match="space: none given"):
        make_trainer(w_mcl=0.0, shift=False, w_distillation=0.5, space=None)
    with pytest.raises(ValueError, match=r"parallel: none given; wanted translations, for w_anchor is 0\.5"):
        make_trainer(w_mcl=0.0, w_anchor=0.5, parallel=None)
    with pytest.raises(ValueError, match=r"w_replay: got -1\.0; wanted 0 or more"):
        make_trainer(w_replay=-1.0)
    with pytest.raises(ValueError, match="w_anchor: got nan; wanted 0 or more"):
        make_trainer(w_anchor=float("nan"))


def distances(model: Any, batch: ContrastiveBatch, boundaries: tuple[int, int]) -> Tensor:
    """L_anchor in the model's precision, one sentence at a time, from Hugging Face's hidden states."""
    found = []
    rows = (batch["input_ids"], batch["attention_mask"], batch["pool_mask"])
    for ids, attention, pooled in zip(*(each[:3] for each in rows), strict=True):
        tokens, content = ids[attention.bool()][None], pooled[attention.bool()]
        hidden = model(tokens, output_hidden_states=True).hidden_states
        with torch.no_grad(), model.disable_adapter():
            base = model(tokens, output_hidden_states=True).hidden_states
        for k in boundaries:
            ours, theirs = (each[k][0, content].mean(0) for each in (hidden, base))
            found.append((ours - theirs).square().sum() / theirs.square().sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("in_passing", [True, False])
def test_anchoring_and_its_gradients(
    load_model: Callable[..., Any], space: LanguageSpace, batch: ContrastiveBatch, in_passing: bool
) -> None:
    exact = load_model().double()
    expected = distances(exact, batch, (1, 3))
    expected.backward()
    model = load_model()
    with attach(model, space, 1, 3) as handle:
        base = base_representations(model, batch, (1, 3), keep_massive=True)
        seen: list[Tensor] = []
        if in_passing:
            mcl_loss(model, batch, handle, see_pivot=seen.append)  # whose translations are shifted
        else:
            seen.append(pivot_representations(model, batch, (1, 3), keep_massive=True))
        found = anchor_loss(seen[0], base)
        found.backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-6)
    wanted = {name: each.grad for name, each in exact.named_parameters() if each.grad is not None}
    assert any(
        ".layers.2." in name for name in wanted
    )  # block b - 1, which the contrastive loss does not run
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            theirs = wanted.get(name, torch.zeros_like(ours).double())
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-6, msg=name)


def test_the_base_is_not_away_from_itself(load_model: Callable[..., Any], batch: ContrastiveBatch) -> None:
    model = load_model(dropout=0.5).train()
    base = base_representations(model, batch, (1, 3))
    assert torch.equal(base, base_representations(model, batch, (1, 3)))  # without dropout
    assert anchor_loss(base, base).item() == 0
    assert model.training


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"intervention": "centre"},
        *(
            pytest.param(settings, marks=pytest.mark.slow("trains twice, in one more way"))
            for settings in (
                {"w_mcl": 0.0},
                {"contrastive_mini_batch_size": 2},
                {"vectors": "ema", "final_estimation": False},
                {"w_replay": 0.1},
            )
        ),
    ],
    ids=str,
)
def test_an_anchored_run_stays_nearer_to_the_base(
    make_trainer: Callable[..., ShifConTrainer], load_model: Callable[..., Any], settings: dict[str, Any]
) -> None:
    distance = {}
    for name, weight in (("free", 1e-9), ("kept", 300.0)):
        model = load_model()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.zeros_(parameter)
        trainer = make_trainer(
            folder=name, model=model, w_anchor=weight, max_steps=6, learning_rate=3e-3, **settings
        )
        trainer.train()
        first, *_, last = (row for row in trainer.state.log_history if "loss" in row)
        assert first["loss_anchor"] == pytest.approx(0, abs=1e-9)  # the pass at hand is the unshifted pivot's
        distance[name] = last["loss_anchor"]
        args, shares = trainer.args, {"w_anchor": "loss_anchor", "w_gen": "loss_generation"}
        shares |= {"w_mcl": "loss_contrastive"} if args.w_mcl else {}
        shares |= {"w_replay": "loss_replay"} if args.w_replay else {}
        total = sum(getattr(args, weight) * last[loss] for weight, loss in shares.items())
        assert last["loss"] == pytest.approx(total, rel=1e-3)
    assert distance["kept"] < 0.7 * distance["free"]
