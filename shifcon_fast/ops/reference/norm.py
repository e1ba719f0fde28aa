"""Reference ``add_shift_rms_norm`` in plain PyTorch.

h = round(x + residual + shift[index]), rstd = 1 / sqrt(mean(h²) + eps), x̂ = h · rstd, all in float32, and

    llama: y = round(round(x̂) · w)        gemma: y = round(x̂ · (1 + w))        olmo: y = round(x̂ · w)

With g = ∂L/∂y · w (or 1 + w), rounding passed straight through:

    ∂L/∂h = rstd · (g - x̂ · mean(g · x̂)) + (∂L/∂h from above),    ∂L/∂w = Σ_rows ∂L/∂y · x̂.
"""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

import torch
from torch import Tensor

from shifcon_fast.ops.library import compute_dtype


def _factor(weight: Tensor, style: str, dtype: torch.dtype) -> Tensor:
    return 1.0 + weight.to(dtype) if style == "gemma" else weight.to(dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    eps: float,
    style: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y, h (``None`` when it is x itself) and rstd (x.shape[:-1], float32)."""
    compute = compute_dtype(x.dtype)
    h = None
    if residual is not None or shift is not None:
        total = x.to(compute) if residual is None else x.to(compute) + residual.to(compute)
        h = x if residual is None else total.to(x.dtype)
        if shift is not None and index is not None:
            rows = index.reshape(index.shape + (1,) * (x.ndim - index.ndim)).long()
            shifts = shift.to(compute)[rows.squeeze(-1).clamp(min=0)]
            # Selecting, not adding zero: -0.0 + 0.0 is 0.0, and a row of id -1 stays as it was bit for bit.
            h = torch.where(rows >= 0, (total + shifts).to(x.dtype), h)
        h = h.contiguous()
    normalised = (x if h is None else h).to(compute)
    rstd = torch.rsqrt(normalised.pow(2).mean(-1, keepdim=True) + eps)
    normalised = normalised * rstd
    if style == "llama":
        normalised = normalised.to(x.dtype).to(compute)
    y = (normalised * _factor(weight, style, compute)).to(x.dtype)
    return y.contiguous(), h, rstd.squeeze(-1).contiguous()


def backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    index: Tensor | None,
    languages: int,
    style: str,
    need_input: bool,
    need_weight: bool,
    need_shift: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x and residual (one tensor), weight and shift; the latter two in float32."""
    hidden = h.shape[-1]
    compute = rstd.dtype
    grad = None if grad_h is None else grad_h.to(compute)
    grad_weight = grad_shift = None
    if grad_y is not None:
        normalised = h.to(compute) * rstd.unsqueeze(-1)
        grad_y = grad_y.to(compute)
        if need_weight:
            multiplied = normalised.to(h.dtype).to(compute) if style == "llama" else normalised
            grad_weight = (grad_y * multiplied).reshape(-1, hidden).sum(0)
        grad_y = grad_y * _factor(weight, style, compute)
        through = grad_y - normalised * (grad_y * normalised).mean(-1, keepdim=True)
        through = through * rstd.unsqueeze(-1)
        grad = through if grad is None else through + grad
    if grad is not None and need_shift and index is not None:
        languages_of_rows = index.reshape(-1).long()
        per_index = (
            grad.reshape(index.numel(), -1, hidden).sum(1) if index.numel() else grad.new_zeros(0, hidden)
        )
        kept = languages_of_rows >= 0
        grad_shift = grad.new_zeros(languages, hidden)
        grad_shift.index_add_(0, languages_of_rows[kept], per_index[kept])
    grad_input = None
    if need_input and grad is not None:
        grad_input = grad.to(h.dtype).contiguous()
        if grad_h is not None and grad_input.data_ptr() == grad_h.data_ptr():
            grad_input = grad_input.clone()  # an operator may not return its input
    return grad_input, grad_weight, grad_shift
