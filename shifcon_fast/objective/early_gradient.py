"""One loss of several, gone through backward before the next one's forward: its activations are freed by then.

The gradients wait in the weights' sizes (those of adapters are small) and join the one ``backward`` that the caller
calls on the sum, scaled by whatever it scales. So DDP's reductions, accumulation and clipping meet each weight's
gradient once, as they would without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def can_go_early(weights: Sequence[Tensor]) -> bool:
    """Whether the weights' gradients may be taken now: neither sharded nor with hooks, which would run twice."""
    return all(type(weight) in _WHOLE and not weight._backward_hooks for weight in weights)


_WHOLE = (Tensor, torch.nn.Parameter)


def with_gradient_now(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The loss, whose graph is gone: its gradients in the weights are known, and a later backward hands them out.

    Args:
        loss: () with a graph.
        weights: leaves that require gradients; those that the loss does not reach get none.
    """
    reached = torch.autograd.grad(loss, weights, allow_unused=True)
    found = [
        (weight, gradient) for weight, gradient in zip(weights, reached, strict=True) if gradient is not None
    ]
    if not found:
        return loss.detach()
    handed: Tensor = _Handed.apply(
        loss.detach(), [gradient for _, gradient in found], *(each for each, _ in found)
    )
    return handed


class _Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, []  # in place, so only once
        if not gradients:
            raise RuntimeError("backward: called twice on a loss whose gradients are handed out once")
        return None, None, *(gradient.mul_(scale) for gradient in gradients)
