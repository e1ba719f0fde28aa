"""Rows made unit length and re-centred, and the way back for gradients; what the contrastive operators share.

u = a / ‖a‖,  v = b / ‖b‖,  b′ = v - mean(v) + mean(u).   A zero row stays zero and gets no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_lengths(x: Tensor, compute: torch.dtype) -> Tensor:
    """1 / ‖row‖ of (L, N, d) as (L, N, 1), and 0 for a zero row."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=compute)
    return torch.where(length == 0, 0, 1 / length)


def through_unit(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x from that of unit = x · inverse: (g - u (u · g)) / ‖x‖."""
    return (grad - unit * (unit * grad).sum(-1, keepdim=True)).mul_(inverse)
