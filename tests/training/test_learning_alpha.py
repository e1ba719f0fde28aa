"""α learnt with the adapters: its gradient, its group, saved, loaded, resumed, exported, refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import shifcon_fast as sf
from shifcon_fast.export.shift_vectors import shift_vectors
from shifcon_fast.modeling.attach import attach
from shifcon_fast.objective.mcl import mcl_loss
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.run.run_card import read_card
from shifcon_fast.training.run.shift_file import read_shift, write_shift
from shifcon_fast.training.trainer import ShifConTrainer

TOKENS = torch.tensor([[5, 17, 33, 41]])


@pytest.mark.parametrize("intervention", ["mean", "subspace", "affine"])
def test_the_contrastive_loss_reaches_alpha(
    load_model: Callable[..., Any], space: LanguageSpace, intervention: Any
) -> None:
    """Its pooled means are shifted apart from the tokens: against central differences."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 70, (6, 7), generator=generator)
    batch: Any = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pool_mask": torch.ones_like(ids).bool(),
        "language_ids": torch.tensor([0, 0, 0, 2, 1, 2]),
    }
    model = load_model().eval().requires_grad_(False)
    with attach(model, space, 1, 3, intervention=intervention) as handle:
        alphas = handle.learn_alpha()

        def loss() -> Tensor:
            return mcl_loss(model, batch, handle, temperature=0.5)

        loss().backward()
        assert alphas.grad is not None
        for language in (1, 2):
            found = []
            for step in (0.02, -0.02):
                with torch.no_grad():
                    alphas[language] += step
                    found.append(loss().item())
                    alphas[language] -= step
            expected = (found[0] - found[1]) / 0.04
            assert alphas.grad[language].item() == pytest.approx(expected, rel=0.02, abs=2e-4)
        assert alphas.grad[0] == alphas.grad[3] == 0  # the pivot, and a language without a row


@pytest.mark.parametrize("vectors", ["frozen", "ema"])
def test_what_is_learnt_is_saved_loaded_and_exported(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path, vectors: str
) -> None:
    trainer = make_trainer(
        learn_alpha=True,
        alpha_learning_rate=0.05,
        alpha=0.5,
        vectors=vectors,
        lr_scheduler_type="constant",
        w_gen=0.5,
        w_mcl=2.0,  # gradients of alpha far above AdamW's epsilon
    )
    trainer.train()
    assert trainer.handle is not None
    card, shift = read_card(tmp_path / "run"), trainer.handle.shift
    assert card["alphas"] == shift.alphas_by_language
    assert card["alphas"]["en"] == 1  # rows of the pivot are not shifted, and nothing decays
    log = [row for row in trainer.state.log_history if "loss" in row]
    for code in ("sw", "de", "tr"):  # AdamW's first step is a learning rate long
        assert abs(log[0][f"alpha_{code}"] - 0.5) == pytest.approx(0.5 * 0.05, rel=1e-4)
    assert log[-1]["alpha_sw"] == pytest.approx(0.5 * card["alphas"]["sw"])
    assert "alpha_en" not in log[-1]
    loaded = sf.load(tmp_path / "run")
    assert torch.equal(loaded.shifcon.shift.alphas, shift.alphas)
    assert "| alpha |" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    with torch.no_grad():
        model = trainer.model.eval()
        expected = model(TOKENS, language_ids=model.shifcon.language_ids("sw")).logits
        got = loaded(TOKENS, language_ids=loaded.shifcon.language_ids("sw")).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    toward = shift.vectors[0, shift.pivot_id] - shift.vectors[0, shift.language_id("sw")]
    torch.testing.assert_close(shift_vectors(loaded, "sw").at[1], shift.alpha_of("sw") * toward)
    assert {name for name, _ in loaded.named_parameters() if "shifcon" in name} == set()


def test_a_run_goes_on_where_alpha_was(make_trainer: Callable[..., ShifConTrainer], tmp_path: Path) -> None:
    settings = {"learn_alpha": True, "alpha_learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**settings)
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = make_trainer(folder="again", **settings)
    again.train(checkpoint)
    first, second = (each.handle.shift.alphas for each in (whole, again))  # type: ignore[union-attr]
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="learn_alpha is true, here it is false"):
        make_trainer(folder="other").train(checkpoint)
    make_trainer(folder="plain", max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="its alpha was not learnt, here it is"):
        make_trainer(folder="other", **settings).train(str(tmp_path / "plain" / "checkpoint-1"))
    trained = read_shift(Path(checkpoint), read_card(checkpoint))
    assert trained is not None
    further = make_trainer(folder="further", space=trained, forward=None, backward=None, learn_alpha=True)
    assert torch.equal(further.handle.learnt_alphas.data, trained.alphas)  # type: ignore[union-attr]


def test_alpha_has_a_group_of_its_own(make_trainer: Callable[..., ShifConTrainer]) -> None:
    trainer = make_trainer(learn_alpha=True, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    alphas = trainer.handle.learnt_alphas  # type: ignore[union-attr]
    holders = [group for group in groups if any(each is alphas for each in group["params"])]
    assert [(len(each["params"]), each["lr"], each["weight_decay"]) for each in holders] == [(1, 3e-3, 0.0)]
    optimizer = torch.optim.SGD([each for each in trainer.model.parameters() if each is not alphas], lr=0.1)
    other = make_trainer(folder="other", learn_alpha=True)
    other.optimizer = optimizer
    with pytest.raises(ValueError, match="the SGD does not hold it"):
        other.create_optimizer()


def test_without_it_nothing_is_learnt(make_trainer: Callable[..., ShifConTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=1)
    assert trainer.handle is not None
    assert trainer.handle.learnt_alphas is None
    trainer.train()
    assert "alphas" not in read_card(tmp_path / "run")


def test_where_it_makes_no_sense_it_is_refused(
    load_model: Callable[..., Any],
    space: LanguageSpace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_trainer: Callable[..., ShifConTrainer],
) -> None:
    for settings, message in (
        ({"shift": False}, "learn_alpha: got True with shift=False"),
        ({"alpha": 0.0}, "learn_alpha: got True with alpha=0"),
        ({"w_gen": 0.0, "mcl_mode": "pooled"}, "of which no loss depends on alpha"),
        ({"alpha_learning_rate": 0.0}, "alpha_learning_rate: got 0.0; wanted a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            ShifConArguments(str(tmp_path), learn_alpha=True, report_to="none", use_cpu=True, **settings)
    model = load_model()
    handle = attach(model, space, 1, 3, 0.0)
    with pytest.raises(ValueError, match="learn_alpha: alpha is 0"):
        handle.learn_alpha()
    handle.detach()
    monkeypatch.setattr(ShifConTrainer, "is_fsdp_enabled", True, raising=False)
    monkeypatch.setattr(ShifConTrainer, "is_deepspeed_enabled", False, raising=False)
    trainer = object.__new__(ShifConTrainer)
    trainer.handle, trainer.args = (
        attach(model, space, 1, 3),
        ShifConArguments(str(tmp_path), learn_alpha=True, report_to="none", use_cpu=True),
    )
    with pytest.raises(ValueError, match="learn_alpha: not under FSDP or DeepSpeed"):
        trainer._start_alpha()
    with pytest.raises(ValueError, match="alpha: language: got 'xx'"):
        attach(load_model(), space, 1, 3, {"xx": 0.5})


@pytest.mark.parametrize("name", ["alphas", "bases"])
def test_a_file_that_does_not_fit_is_refused_by_name(space: LanguageSpace, tmp_path: Path, name: str) -> None:
    shift = replace(space.shift(1, 3, intervention="subspace"), alphas=torch.ones(4))
    card: Any = {
        "languages": list(shift.languages),
        "pivot": "en",
        "area": {"forward": 1, "backward": 3},
        "fingerprint": {"num_blocks": shift.num_boundaries},
        "alpha": 1.0,
        "recipe": "stable",
        "intervention": "subspace",
    }
    write_shift(tmp_path, shift)
    read = read_shift(tmp_path, card)
    assert read is not None
    assert torch.equal(read.alphas, shift.alphas)  # type: ignore[arg-type]
    file = tmp_path / "shift.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    tensors[name] = tensors[name][:1].contiguous()
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=rf"shift.safetensors: does not fit the card beside it: {name}: got"):
        read_shift(tmp_path, card)
