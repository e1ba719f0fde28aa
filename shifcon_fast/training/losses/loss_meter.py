"""Means of the losses between two log lines, and the error for a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient became NaN or infinite. The message says at which step, and which."""


class LossMeter:
    """Sums the shares of the losses' micro-batches on their device; read once per log line."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, name: str, share: Tensor) -> None:
        """Add a micro-batch's share of a step's loss."""
        share = share.detach().float()
        self._sums[name] = self._sums[name] + share if name in self._sums else share

    def end_step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    def drain(self, average: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means per step since the last call, averaged over processes by ``average``, and start again."""
        if not self._steps:
            return {}
        means = {name: float(average(total)) / self._steps for name, total in sorted(self._sums.items())}
        self._sums, self._steps = {}, 0
        return means


class FiniteWatch:
    """Finds losses and gradient norms that are not finite, without making the host wait for the device.

    What a step gave travels to the host while the host goes on. It is looked at when somebody asks: one step later,
    by when it has long arrived, and before anything is logged, evaluated or saved. Whoever asks again is told the
    same again, since the model has taken that step.
    """

    def __init__(self) -> None:
        self._noted: list[_Noted] = []
        self._found: str | None = None

    def note(self, values: dict[str, Tensor], step: int, micro_batch: int | None = None) -> None:
        """Take note of scalars of a step; of its micro-batch, where they are losses, else of the whole step."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._noted.append(_Noted(tuple(values), OnItsWay(stacked), step, micro_batch))

    def problem(self, before: int | None = None) -> str | None:
        """What is wrong with the first value that is not finite; None if nothing is.

        Args:
            before: look at the steps before this one only; None for all.
        """
        ready = [each for each in self._noted if before is None or each.step < before]
        self._noted = self._noted[len(ready) :]
        if self._found is None:
            self._found = next((told for each in ready if (told := each.problem()) is not None), None)
        return self._found


class OnItsWay:
    """A tensor's values on the host, once they have arrived there."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[float]:
        """Of a vector; waits for what has not arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class _Noted(NamedTuple):
    names: tuple[str, ...]
    host: OnItsWay
    step: int
    micro_batch: int | None

    def problem(self) -> str | None:
        values = dict(zip(self.names, self.host.values(), strict=True))
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not broken:
            return None
        fine = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if math.isfinite(value))
        if self.micro_batch is None:
            where, advice = f"step {self.step}", "Lower learning_rate, or use bfloat16 or float32"
        else:
            where = f"step {self.step}, micro-batch {self.micro_batch}"
            advice = "Lower learning_rate, alpha or w_mcl, or load the model in bfloat16 or float32"
        return (
            f"{where}: {', '.join(broken)}{f' ({fine})' if fine else ''}. Nothing of this step or of a later one "
            f"was saved; the model in memory has taken the step. {advice}"
        )
