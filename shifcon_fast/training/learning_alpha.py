"""A trainer's learnt α: a learning rate of its own, in the log, and where a checkpoint left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.run.run_card import read_card
from shifcon_fast.training.run.shift_file import read_shift


class AlphaTrainer:
    """Mixin of trainers: α of each language is trained too, where the arguments or the handle say so."""

    args: ShifConArguments
    handle: ShiftHandle | None
    optimizer: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool

    def _start_alpha(self) -> None:
        """Once the model is where it is trained, and what casts or freezes parameters is over.

        Raises:
            ValueError: sharded weights.
        """
        if self.handle is None or not (self.args.learn_alpha or self.handle.learnt_alphas is not None):
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "learn_alpha: not under FSDP or DeepSpeed, which take parameters apart or cast them, and alpha is "
                "a few numbers in float32; wanted DDP, or learn_alpha=False"
            )
        self.handle.learn_alpha()

    @property
    def _alphas(self) -> nn.Parameter | None:
        return None if self.handle is None else self.handle.learnt_alphas

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s, with the learnt α in a group of its own: ``alpha_learning_rate``, no weight decay.

        Raises:
            ValueError: an optimizer of the caller's that does not hold α.
        """
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if (alphas := self._alphas) is None:
            return optimizer
        groups = getattr(optimizer, "param_groups", ())
        holder = next((each for each in groups if any(one is alphas for one in each["params"])), None)
        if holder is None:
            raise ValueError(
                f"learn_alpha: the {type(optimizer).__name__} does not hold it; wanted an optimizer made after "
                "handle.learn_alpha(), over all parameters that require gradients, or the trainer's own"
            )
        if not given:
            holder["params"] = [each for each in holder["params"] if each is not alphas]
            rate = self.args.alpha_learning_rate
            optimizer.add_param_group({"params": [alphas], "lr": rate, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds ``alpha_{language}`` of each language that is moved, where it is learnt."""
        if "loss" in logs and self._alphas is not None:
            assert self.handle is not None
            shift = self.handle.shift
            moved = (code for code in shift.languages if shift.moves_pivot or code != shift.pivot)
            logs.update({f"alpha_{code}": shift.alpha_of(code) for code in moved})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _load_vectors(self, checkpoint: Path) -> None:
        super()._load_vectors(checkpoint)  # type: ignore[misc]
        if (alphas := self._alphas) is None:
            return
        shift = read_shift(checkpoint, read_card(checkpoint))
        assert shift is not None
        assert shift.alphas is not None  # check_same_run
        with torch.no_grad():
            alphas.copy_(shift.alphas)
