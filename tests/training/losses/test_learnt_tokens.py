"""Learnt tokens that a collator counted give what counting on the device gives, or are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from shifcon_fast.training.losses import chunked_cross_entropy as room
from shifcon_fast.training.losses.learnt_tokens import LEARNT, LearntTokens, take_learnt
from shifcon_fast.training.losses.loss_without_logits import LossWithoutLogits
from shifcon_fast.training.trainer import ShifConTrainer

IDS = torch.tensor([[5, 6, 7, 8, 9, 0], [9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9, -100], [-100, -100, -100, 6, 5, 4], [1, -100, 3, -100, 5, -100]])
BY_ROW = torch.tensor([2, -1, 2])
BY_TOKEN = torch.tensor([[0, 0, 1, 1, 0, -1], [-1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("languages", [None, BY_ROW, BY_TOKEN], ids=["none", "by row", "by token"])
def test_they_are_those_of_the_labels_language_by_language(languages: Tensor | None) -> None:
    learnt = LearntTokens.of(LABELS, languages)
    expected = {}
    for row in range(3):
        for t in range(1, 6):
            if LABELS[row, t] != -100:
                ids = None if languages is None else languages
                language = 0 if ids is None else int(ids[row] if ids.dim() == 1 else ids[row, t])
                expected.setdefault(language, []).append(5 * row + t - 1)
    assert learnt.places.tolist() == [place for key in sorted(expected) for place in expected[key]]
    if languages is None:
        assert learnt.languages is None
        return
    assert learnt.languages is not None
    assert learnt.languages.ids.tolist() == sorted(expected)
    assert learnt.languages.counts.tolist() == learnt.languages.sizes
    assert learnt.languages.sizes == [len(expected[key]) for key in sorted(expected)]


@pytest.mark.parametrize("few", [0, 64], ids=["by language", "by token"])
@pytest.mark.parametrize("languages", [None, BY_ROW, BY_TOKEN], ids=["none", "by row", "by token"])
def test_losses_and_gradients_are_those_without(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, languages: Tensor | None, few: int
) -> None:
    monkeypatch.setattr(room, "_TOKENS_OF_A_GROUP", few)
    model = tiny_model("llama").train()
    model.lm_head.requires_grad_(False)
    found = []
    for learnt in (None, LearntTokens.of(LABELS, BY_ROW if languages is None else languages)):
        model.zero_grad()
        with LossWithoutLogits(model).engaged(languages, learnt) as each:
            loss = model(IDS, labels=LABELS).loss
        loss.backward()
        assert each.problem is None
        weight = model.model.layers[0].mlp.up_proj.weight
        sums = None if each.losses is None else [tensor.double() for tensor in each.losses]
        found.append((loss.item(), weight.grad.clone(), sums))
    (plain, gradient, sums), (counted, other_gradient, other_sums) = found
    assert counted == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-8)
    assert (sums is None) == (other_sums is None) == (languages is None)
    for ours, theirs in zip(other_sums or [], sums or [], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_batch_that_was_cut_up_since_is_counted_anew() -> None:
    batch = {"labels": LABELS, LEARNT: LearntTokens.of(LABELS, BY_ROW)}
    moved = send_to_device(batch, torch.device("meta"))
    assert moved[LEARNT].places.device.type == "meta"
    assert moved[LEARNT].languages.ids.device.type == "meta"
    whole, cut = dict(batch), {**batch, "labels": LABELS[:2]}
    assert take_learnt(whole) is batch[LEARNT]
    assert take_learnt(cut) is None
    assert take_learnt({"labels": LABELS}) is None
    assert LEARNT not in whole
    assert LEARNT not in cut


def test_the_trainers_batches_have_them_unless_one_process_hands_batches_out(
    make_trainer: Callable[..., ShifConTrainer],
) -> None:
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    assert (
        batch[LEARNT].places.tolist()
        == LearntTokens.of(batch["labels"], batch["language_ids"]).places.tolist()
    )
    dispatched = make_trainer(folder="dispatched", accelerator_config={"dispatch_batches": True})
    assert LEARNT not in dispatched._data.collator(
        [{"input_ids": [5, 6], "labels": [5, 6], "language_id": 0}]
    )
