"""Reference ``contrastive_similarity`` in plain PyTorch: S = scale · u b′ᵀ (see ``unit_rows`` for u and b′).

With G = scale · ∂L/∂S:  ∂L/∂b′ = Gᵀ u,  ∂L/∂v = ∂L/∂b′ - mean over M of it,  ∂L/∂u = G b′ + (its sum over M) / N.
"""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

import torch
from torch import Tensor

from shifcon_fast.ops.library import compute_dtype
from shifcon_fast.ops.reference.unit_rows import inverse_lengths, through_unit


def _prepare(
    a: Tensor, b: Tensor, normalize: bool, recenter: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return u, v, b′ and the inverse lengths (``None`` without normalisation)."""
    compute = compute_dtype(a.dtype)
    unit_a, unit_b = a.to(compute), b.to(compute)
    inverse = None
    if normalize:
        inverse = inverse_lengths(a, compute), inverse_lengths(b, compute)
        unit_a, unit_b = unit_a * inverse[0], unit_b * inverse[1]
    moved = unit_b
    if recenter:
        moved = unit_b + (unit_a.mean(1, keepdim=True) - unit_b.mean(1, keepdim=True))
    return unit_a, unit_b, moved, inverse


def forward(a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool) -> Tensor:
    """Return S (L, N, M) float32."""
    unit_a, _, moved, _ = _prepare(a, b, normalize, recenter)
    return torch.bmm(unit_a, moved.mT).mul_(scale)


def backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a and b in their dtype, each only when needed."""
    unit_a, unit_b, moved, inverse = _prepare(a, b, normalize, recenter)
    grad = grad.to(unit_a.dtype) * scale
    grad_a = torch.bmm(grad, moved) if need_a else None
    grad_b = torch.bmm(grad.mT, unit_a) if need_b or recenter else None
    if recenter and grad_b is not None:
        total = grad_b.sum(1, keepdim=True)
        if grad_a is not None:
            grad_a = grad_a + total / max(a.shape[1], 1)
        grad_b = grad_b - total / max(b.shape[1], 1)
    if inverse is not None:
        grad_a = None if grad_a is None else through_unit(grad_a, unit_a, inverse[0])
        grad_b = None if grad_b is None else through_unit(grad_b, unit_b, inverse[1])
    return (
        grad_a.to(a.dtype) if grad_a is not None else None,
        grad_b.to(b.dtype) if need_b and grad_b is not None else None,
    )
