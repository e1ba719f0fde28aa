"""Reference ``masked_mean_pool`` in plain PyTorch.

m = Σ_t mask · h / count in float32; e = m, or m / ‖m‖ when normalised. With factor = 1 / count, or
1 / (count · ‖m‖) when normalised, and 0 for an empty row or a zero mean, every selected token gets

    ∂L/∂h_t = factor · g,    or    factor · (g - e · (e · g))    when normalised.
"""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

import torch
from torch import Tensor

from shifcon_fast.ops.library import compute_dtype


def forward(h: Tensor, mask: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return the pooled rows (B, d) and factor (B,), both float32."""
    compute = compute_dtype(h.dtype)
    selected = mask != 0
    # Selecting, not multiplying: zero times a NaN under the mask would be NaN.
    total = torch.where(selected.unsqueeze(-1), h, h.new_zeros(())).sum(1, dtype=compute)
    count = selected.sum(1, dtype=compute)
    factor = torch.where(count > 0, 1 / count, 0)
    pooled = total * factor.unsqueeze(-1)
    if normalize:
        length = torch.linalg.vector_norm(pooled, dim=-1)
        inverse = torch.where(length == 0, 0, 1 / length)
        pooled = pooled * inverse.unsqueeze(-1)
        factor = factor * inverse
    return pooled.contiguous(), factor


def backward(
    grad: Tensor, pooled: Tensor, factor: Tensor, mask: Tensor, dtype: torch.dtype, normalize: bool
) -> Tensor:
    """Return the gradient of h: (B, T, d) in ``dtype``."""
    grad = grad.to(pooled.dtype)
    if normalize:
        grad = grad - pooled * (grad * pooled).sum(-1, keepdim=True)
    per_token = (grad * factor.unsqueeze(-1)).to(dtype).unsqueeze(1)
    return torch.where((mask != 0).unsqueeze(-1), per_token, per_token.new_zeros(()))
