"""Gradient checkpointing is what was asked for, and where nothing was, what memory allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shifcon_fast.training.trainer import ShifConTrainer
from shifcon_fast.training.weights import activation_memory, checkpointing
from shifcon_fast.training.weights.activation_memory import Micro, free_bytes, judge, saved_bytes
from shifcon_fast.training.weights.step_plan import _bytes_of

QUICK: dict[str, Any] = {"max_steps": 1}


def is_on(trainer: ShifConTrainer) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("loaded", "given", "free", "expected"),
    [
        (None, None, 2**40, False),
        (None, None, 2**10, True),
        (None, False, 2**10, False),
        (None, True, 2**40, True),
        (True, None, 2**40, True),
        (False, None, 2**10, False),
        (False, True, 2**40, True),
        (True, False, 2**10, False),
    ],
)
def test_what_was_asked_for_and_else_what_fits(
    *,
    make_trainer: Callable[..., ShifConTrainer],
    load_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    loaded: bool | None,
    given: bool | None,
    free: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(activation_memory, "free_bytes", lambda device: free)
    settings = {} if given is None else {"gradient_checkpointing": given}
    trainer = make_trainer(model=load_model(gradient_checkpointing=loaded), **settings, **QUICK)
    trainer.train()
    assert is_on(trainer) == expected
    said = "gradient checkpointing is " + ("on" if expected else "off")
    assert (said in caplog.text) == (loaded is None and given is None)


def test_the_losses_and_weights_are_the_same_either_way(
    make_trainer: Callable[..., ShifConTrainer],
    load_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for free in (2**40, 0):
        monkeypatch.setattr(activation_memory, "free_bytes", lambda device, free=free: free)
        model = load_model(dropout=0.5, gradient_checkpointing=None)
        trainer = make_trainer(folder=str(free), model=model, max_steps=2)
        trainer.train()
        assert is_on(trainer) == (free == 0)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found.append((losses, [each for each in trainer.model.parameters() if each.requires_grad]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_those_that_a_forward_pass_keeps(
    make_trainer: Callable[..., ShifConTrainer], quantization: str, attention: str
) -> None:
    """A row of 64 tokens says what four of 128 keep, within the 15 % that a prediction may be off by."""
    trainer = make_trainer(quantization=quantization)
    model, decoder = trainer.model, trainer.model.base_model.model.model
    model.base_model.model.config._attn_implementation = attention
    checkpointing.disable_gradient_checkpointing(trainer.model)
    ids = torch.randint(3, 60, (4, 64))

    def forward() -> torch.Tensor:
        with trainer.handle.suspended():
            return decoder(input_ids=ids, use_cache=False).last_hidden_state.mean()

    forward().backward()
    kept, _ = _bytes_of(forward, torch.device("cpu"))
    assert saved_bytes(model, 64) * 4 == pytest.approx(kept, rel=0.15)
    assert not any(p.grad is None for p in model.parameters() if p.requires_grad)


def test_measuring_leaves_no_trace(make_trainer: Callable[..., ShifConTrainer]) -> None:
    trainer = make_trainer(dropout=0.1)
    trainer.model.train()
    before = torch.get_rng_state()
    judge(trainer.model, Micro(generation=64))
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in trainer.model.modules())
    assert is_on(trainer)
    assert all(each.grad is None for each in trainer.model.parameters())


def test_what_is_needed_grows_with_what_is_there_at_once(make_trainer: Callable[..., ShifConTrainer]) -> None:
    model = make_trainer().model
    trained = 3 * sum(4 * each.numel() for each in model.parameters() if each.requires_grad)
    token = (judge(model, Micro(generation=1000)).needed - trained) / 1000

    def tokens(micro: Micro) -> float:
        return (judge(model, micro).needed - trained) / token

    pairs: dict[str, Any] = {"contrastive": 3000, "contrastive_share": 0.5}
    assert tokens(Micro(1000, **pairs)) == pytest.approx(1500, rel=1e-3)
    assert tokens(Micro(2000, **pairs)) == pytest.approx(2000, rel=1e-3)
    assert tokens(Micro(1000, **pairs, apart=False)) == pytest.approx(2500, rel=1e-3)
    logits = judge(model, Micro(1000, logits=10**6)).needed - judge(model, Micro(1000)).needed
    assert logits == pytest.approx(12e6)


@pytest.mark.parametrize("settings", [{"w_replay": 0.1}, {"torch_compile": True}])
def test_what_is_not_predicted_keeps_the_default(
    make_trainer: Callable[..., ShifConTrainer],
    load_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    monkeypatch.setattr(checkpointing, "judge", lambda *_: pytest.fail("predicted"))
    trainer = make_trainer(model=load_model(gradient_checkpointing=None), **settings)
    arguments: dict[str, Any] = {"longest": 10, "backward": 3, "in_chunks": True, "apart": True}
    checkpointing.choose_checkpointing(trainer.model, trainer.args, **arguments)
    assert is_on(trainer)


def test_a_container_has_no_more_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(activation_memory, "_CGROUP", tmp_path)
    machine = free_bytes(cpu)
    assert machine > 2**20
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert free_bytes(cpu) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) == pytest.approx(machine, rel=0.5)
