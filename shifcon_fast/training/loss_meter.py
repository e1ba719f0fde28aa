"""Means of the losses between two log lines, and the error for a loss that is not finite."""

from __future__ import annotations

from collections.abc import Callable

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


def check_finite(losses: dict[str, Tensor], step: int, micro_batch: int) -> None:
    """Raise :class:`NonFiniteLossError` if a loss is NaN or infinite. One synchronisation."""
    if bool(torch.isfinite(torch.stack([loss.detach().float() for loss in losses.values()])).all()):
        return
    broken = ", ".join(
        f"{name} is {loss.item()}" for name, loss in losses.items() if not torch.isfinite(loss)
    )
    fine = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items() if torch.isfinite(loss))
    raise NonFiniteLossError(
        f"step {step}, micro-batch {micro_batch}: {broken}{f' ({fine})' if fine else ''}. Nothing of this step was "
        f"saved. Lower learning_rate, alpha or w_mcl, or load the model in bfloat16 or float32"
    )
