"""Nothing in a training step reads a value off the device, and what is prepared is ready before it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from shifcon_fast.training.batches.contrastive_data import ContrastiveSampler
from shifcon_fast.training.losses import chunked_cross_entropy
from shifcon_fast.training.losses.loss_meter import FiniteWatch
from shifcon_fast.training.trainer import ShifConTrainer


def find_packed(position_ids: Tensor) -> Tensor:
    """transformers' own, without its look at whether anything is packed, which waits (once a pass)."""
    before = position_ids[:, :1] - 1
    return (torch.diff(position_ids, prepend=before, dim=-1) != 1).cumsum(-1)


class ThroughTheDispatcher(TorchDispatchMode):
    """Has operators go through PyTorch's dispatcher, which knows what to do on the meta device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vectors": "ema"},
        {"recipe": "official", "forward": 1, "backward": 3},
        {"mcl_mode": "pooled", "vectors": "running"},
        {"contrastive_mini_batch_size": 2},
    ],
    ids=["stable", "ema", "official", "pooled-running", "gradient-caching"],
)
@pytest.mark.parametrize("few_tokens", [0, 2**20], ids=["by-language", "by-token"])
def test_a_step_reads_nothing_from_the_device(
    make_trainer: Callable[..., ShifConTrainer],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    few_tokens: int,
) -> None:
    """On the meta device a tensor has no values: whoever asks for one (``.item()``, ``.tolist()``, ``.cpu()``,
    ``bool()``, indexing by a mask) fails, as it would have waited on an accelerator."""
    trainer = make_trainer(final_estimation=False, **settings)
    trainer.model.base_model.model.config._attn_implementation = "eager"  # sdpa's mask looks for padding
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", find_packed)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.to("meta")
    inputs = {name: value.to("meta") for name, value in inputs.items()}
    assert trainer._without_logits is not None
    trainer._without_logits._tried = True  # the first batch alone is compared with the model's own logits
    monkeypatch.setattr(chunked_cross_entropy, "_TOKENS_OF_A_GROUP", few_tokens)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which knows no meta device
    trainer.current_gradient_accumulation_steps = 1
    monkeypatch.setattr(trainer, "_prepare_inputs", lambda inputs: inputs)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.ones(1, device="meta"))  # what this test relies on
    for step in range(2):
        trainer.state.global_step = step
        with ThroughTheDispatcher():
            loss = trainer.training_step(trainer.model, inputs, torch.tensor(9, device="meta"))
            if trainer._vectors.step():
                trainer.handle.set_shift(trainer._vectors.shift(training=True))
        assert loss.device.type == "meta"
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        trainer._meter.end_step()
    assert len(trainer._watch._noted) == 2


def test_pairs_are_ready_when_a_step_asks_for_them_and_tokenised_once(
    make_trainer: Callable[..., ShifConTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int, int]] = []
    asked: list[tuple[tuple[int, int, int], bool]] = []
    make, batch = ContrastiveSampler._make, ContrastiveSampler.batch

    def count(self: Any, position: Any) -> Any:
        made.append(position)
        return make(self, position)

    def ask(self: Any, *position: int, rank: int = 0) -> Any:
        asked.append(((*position, rank), (*position, rank) in made))  # type: ignore[arg-type]
        return batch(self, *position, rank=rank)

    monkeypatch.setattr(ContrastiveSampler, "_make", count)
    monkeypatch.setattr(ContrastiveSampler, "batch", ask)
    trainer = make_trainer(max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    wanted = [(step, micro, 0) for step in range(3) for micro in range(2)]
    assert asked == [(position, position != (0, 0, 0)) for position in wanted]
    assert made == wanted  # none twice, and none that nobody asks for


def test_a_sentence_is_tokenised_once(
    word_tokenizer: Any, parallel_text: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    class Counting:
        all_special_ids = word_tokenizer.all_special_ids
        pad_token_id, eos_token_id = word_tokenizer.pad_token_id, word_tokenizer.eos_token_id

        def __call__(self, texts: list[str], **settings: Any) -> Any:
            seen.extend(texts)
            return word_tokenizer(texts, **settings)

    ids = {language: index for index, language in enumerate(parallel_text)}
    settings: dict[str, Any] = {"batch_size": 6, "max_length_other": 5}
    counting = ContrastiveSampler(parallel_text, "en", Counting(), ids.__getitem__, **settings)
    plain = ContrastiveSampler(parallel_text, "en", word_tokenizer, ids.__getitem__, **settings)
    for step in range(40):
        batch, expected = counting.batch(step), plain.batch(step)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)  # type: ignore[literal-required]
    assert len(seen) == len(set(seen)) > 80
    cut = [record.message for record in caplog.records if "more than 5 tokens" in record.message]
    assert len(cut) == len(set(cut)) > 0
    assert "are cut at the end for the contrastive loss" in cut[0]


def test_losses_are_looked_at_when_somebody_asks() -> None:
    watch = FiniteWatch()
    watch.note({"loss_generation": torch.tensor(1.0), "loss_contrastive": torch.tensor(2.0)}, 1, 0)
    watch.note({"loss_generation": torch.tensor(1.5), "loss_contrastive": torch.tensor(float("inf"))}, 2, 1)
    watch.note({"gradient norm": torch.tensor(float("nan"))}, 3)
    assert watch.problem(before=2) is None
    assert watch.problem(before=2) is None
    found = watch.problem(before=3)
    assert found is not None
    assert found.startswith(
        "step 2, micro-batch 1: loss_contrastive is inf (loss_generation 1.5). Nothing of"
    )
    assert watch.problem() == watch.problem(before=1) == found  # the first, and whoever asks is told
    alone = FiniteWatch()
    alone.note({"gradient norm": torch.tensor(float("nan"))}, 3)
    assert str(alone.problem()).startswith("step 3: gradient norm is nan. Nothing of this step")
