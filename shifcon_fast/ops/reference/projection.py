"""Reference ``subspace_project`` in plain PyTorch, rows grouped by target language.

x′ = mean_t + V_t V_tᵀ c with c = x - mean_s. With g = ∂L/∂x′ and p = V_t V_tᵀ g:

    ∂L/∂x = p,   ∂L/∂mean_t += g,   ∂L/∂mean_s -= p,   ∂L/∂V_t = Σ_rows g (V_tᵀ c)ᵀ + c (V_tᵀ g)ᵀ.
"""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from shifcon_fast.ops.library import compute_dtype


def _per_row(index: Tensor, x: Tensor) -> Tensor:
    """Language ids of every row of x.reshape(-1, d)."""
    index = index.long().reshape(index.shape + (1,) * (x.ndim - 1 - index.ndim))
    return index.expand(x.shape[:-1]).reshape(-1)


def _groups(source: Tensor, target: Tensor | None, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (target language, row numbers, their source languages), rows with an id of -1 left out."""
    target = _per_row(source if target is None else target, x)
    source = _per_row(source, x)
    moved = (source >= 0) & (target >= 0)
    for language in target[moved].unique().tolist():  # synchronises on CUDA
        rows = (moved & (target == language)).nonzero().squeeze(-1)
        yield language, rows, source[rows]


def forward(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor | None) -> Tensor:
    """Return x′, contiguous, in x's dtype."""
    compute = compute_dtype(x.dtype)
    rows_of_x = x.reshape(-1, x.shape[-1])
    result = rows_of_x.clone()
    for language, rows, sources in _groups(source, target, x):
        directions = basis[language].to(compute)
        centred = rows_of_x[rows].to(compute) - mean[sources].to(compute)
        moved = centred @ directions @ directions.T + mean[language].to(compute)
        result[rows] = moved.to(x.dtype)
    return result.reshape(x.shape).contiguous()


def backward(
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor,
    basis: Tensor,
    source: Tensor,
    target: Tensor | None,
    need_x: bool,
    need_mean: bool,
    need_basis: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (its dtype), mean and basis (float32); x is only there when the basis needs it."""
    compute = compute_dtype(grad.dtype)
    hidden = grad.shape[-1]
    rows_of_grad = grad.reshape(-1, hidden)
    rows_of_x = None if x is None else x.reshape(-1, hidden)
    grad_x = rows_of_grad.clone() if need_x else None
    grad_mean = mean.new_zeros(mean.shape, dtype=compute) if need_mean else None
    grad_basis = basis.new_zeros(basis.shape, dtype=compute) if need_basis else None
    for language, rows, sources in _groups(source, target, grad):
        directions = basis[language].to(compute)
        upper = rows_of_grad[rows].to(compute)
        coefficients = upper @ directions
        projected = coefficients @ directions.T
        if grad_x is not None:
            grad_x[rows] = projected.to(grad.dtype)
        if grad_mean is not None:
            grad_mean[language] += upper.sum(0)
            grad_mean.index_add_(0, sources, projected, alpha=-1)
        if grad_basis is not None and rows_of_x is not None:
            centred = rows_of_x[rows].to(compute) - mean[sources].to(compute)
            grad_basis[language] = upper.T @ (centred @ directions) + centred.T @ coefficients
    return None if grad_x is None else grad_x.reshape(grad.shape).contiguous(), grad_mean, grad_basis
