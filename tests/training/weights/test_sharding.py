"""What sharding asks of a trainer; how it trains is in test_processes.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shifcon_fast.training.weights.sharding import ShardedTrainer


class _Trainer:
    """As transformers': it has an accelerator once this was called."""

    def create_accelerator_and_postprocess(self) -> None:
        self.accelerator: Any = SimpleNamespace(num_processes=1)
        self.is_fsdp_enabled = True


class _Sharded(ShardedTrainer, _Trainer):
    def __init__(self) -> None:
        self.args = SimpleNamespace(fsdp_plugin_args=None)


def test_a_trainer_without_our_arguments_is_sharded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's for preferences has the arguments of transformers and its own."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    trainer = _Sharded()
    trainer.create_accelerator_and_postprocess()
    assert trainer.is_fsdp_enabled
