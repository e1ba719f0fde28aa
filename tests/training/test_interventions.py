"""A run with another intervention than the mean shift: trained, saved, loaded, resumed, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shifcon_fast as sf
from shifcon_fast.export.shift_vectors import shift_vectors
from shifcon_fast.modeling.attach import attach
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.config import parse_config
from shifcon_fast.training.run.run_card import read_card
from shifcon_fast.training.trainer import ShifConTrainer

TOKENS = torch.tensor([[5, 17, 33, 41]])


@pytest.mark.parametrize("intervention", ["random", "centre", "subspace", "affine", "procrustes"])
def test_what_is_loaded_is_what_was_trained(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path, intervention: str
) -> None:
    trainer = make_trainer(intervention=intervention, max_steps=1, w_mcl=0.5)
    trainer.train()
    assert trainer.handle is not None
    assert trainer.handle.engagements[1]["shift"] > 0
    card = read_card(tmp_path / "run")
    assert card["intervention"] == trainer.handle.shift.intervention == intervention
    assert f"intervention {intervention}" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    loaded = sf.load(tmp_path / "run")
    for name in ("directions", "bases", "links", "spread"):
        ours, theirs = (getattr(each.shifcon.shift, name) for each in (trainer.model, loaded))
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours, theirs)
    with torch.no_grad():
        model = trainer.model.eval()
        expected = model(TOKENS, language_ids=model.shifcon.language_ids("sw")).logits
        got = loaded(TOKENS, language_ids=loaded.shifcon.language_ids("sw")).logits
        plain = loaded(TOKENS, language_ids=torch.tensor([-1])).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_a_barycentre_is_kept(make_trainer: Callable[..., ShifConTrainer], tmp_path: Path) -> None:
    make_trainer(targets=["en", "de"], max_steps=1, w_mcl=0.0).train()
    assert read_card(tmp_path / "run")["targets"] == ["en", "de"]
    assert sf.load(tmp_path / "run").shifcon.shift.moves_pivot


@pytest.mark.parametrize("vectors", ["ema", "refresh"])
def test_vectors_that_follow_keep_the_map(
    make_trainer: Callable[..., ShifConTrainer], space: LanguageSpace, vectors: str
) -> None:
    trainer = make_trainer(
        intervention="affine", vectors=vectors, refresh_every=1, max_steps=2, ema_decay=0.5
    )
    trainer.train()
    before, after = space.shift(1, 3, intervention="affine"), trainer.handle.shift  # type: ignore[union-attr]
    assert after.intervention == "affine"
    assert torch.equal(before.links, after.links)  # type: ignore[arg-type]
    assert not torch.allclose(before.vectors, after.vectors)


def test_a_run_goes_on_with_its_own_intervention(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path
) -> None:
    make_trainer(intervention="subspace", max_steps=2, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match="intervention is subspace, here it is mean"):
        make_trainer(folder="other", max_steps=2).train(checkpoint)
    trainer = make_trainer(folder="other", intervention="subspace", max_steps=2)
    trainer.train(checkpoint)
    assert trainer.state.global_step == 2


def test_an_attached_model_says_how(
    make_trainer: Callable[..., ShifConTrainer],
    load_model: Callable[..., torch.nn.Module],
    space: LanguageSpace,
) -> None:
    model = load_model()
    attach(model, space, 1, 3, intervention="procrustes")
    with pytest.raises(ValueError, match="intervention: got mean; the model is attached with procrustes"):
        make_trainer(model=model, intervention="mean")
    assert make_trainer(model=model).handle.shift.intervention == "procrustes"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("intervention", "reason"), [("affine", "a map between"), ("centre", "moves the pivot")]
)
def test_exports_that_hold_one_vector_refuse(
    load_model: Callable[..., torch.nn.Module], space: LanguageSpace, intervention: str, reason: str
) -> None:
    model = load_model()
    attach(model, space, 1, 3, intervention=intervention)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=reason):
        shift_vectors(model, "sw")


def test_what_a_file_and_the_flags_say(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    needed = "model: m\nparallel: p\ninstructions: i\noutput: o\nreport_to: none\nuse_cpu: true\n"
    file.write_text(f"{needed}intervention: subspace\ntargets: [en, de]\n", encoding="utf-8")
    _, args = parse_config(file)
    assert (args.intervention, args.targets) == ("subspace", ["en", "de"])
    _, args = parse_config(file, ["--targets", "en,fr"])
    assert args.targets == ["en", "fr"]
    with pytest.raises(ValueError, match="intervention: got 'rotate'; wanted one of mean"):
        parse_config(file, ["--intervention", "rotate"])
