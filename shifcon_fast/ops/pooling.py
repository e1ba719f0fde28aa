"""``masked_mean_pool``: the mean over the tokens a mask selects."""

# ruff: noqa: PLR0917 - an operator's parameters are positional

from __future__ import annotations

import torch
from torch import Tensor

from shifcon_fast.ops.library import Gradients, compute_dtype, define
from shifcon_fast.ops.validation import MASK, check_floating, check_impl, check_same_device


def masked_mean_pool(h: Tensor, mask: Tensor, normalize: bool = False, impl: str = "auto") -> Tensor:
    """e = mean of h[b, t] over the t with mask[b, t] != 0, accumulated in float32.

    Any mask will do: left padding, holes. What lies under the mask is never read into the result, NaN included. An
    empty row gives zeros and zero gradient.

    Args:
        h: (B, T, d) float32, bfloat16 or float16, any strides.
        mask: (B, T) bool or integer.
        normalize: make each result unit length; a zero mean stays zero, with zero gradient.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (B, d) float32 (float64 for a float64 h), differentiable in h.

    Raises:
        TypeError: an argument is not a tensor of a fitting dtype.
        ValueError: a shape, device or impl does not fit.
    """
    check_impl(impl)
    check_floating("h", h)
    if h.ndim != 3:
        raise ValueError(f"h: got shape {tuple(h.shape)}; wanted (batch, tokens, hidden)")
    if not isinstance(mask, Tensor) or mask.dtype not in MASK:
        got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: got {got}; wanted a bool or integer tensor")
    if mask.shape != h.shape[:2]:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}; wanted h.shape[:2] = {tuple(h.shape[:2])}")
    check_same_device("mask", mask, "h", h)
    return _operator(h, mask, bool(normalize), impl)[0]


def _fake(h: Tensor) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(h.dtype)
    batch, _, hidden = h.shape
    return h.new_empty((batch, hidden), dtype=compute), h.new_empty((batch,), dtype=compute)


def _fake_gradients(
    grad: Tensor, pooled: Tensor, factor: Tensor, mask: Tensor, dtype: torch.dtype, normalize: bool
) -> Tensor:
    return grad.new_empty((*mask.shape, grad.shape[-1]), dtype=dtype)


_operator = define(
    masked_mean_pool,
    outputs=("pooled", "factor"),
    fake=_fake,
    gradients=Gradients(
        fake=_fake_gradients, of={"h": ("h",)}, derived={"dtype": lambda h: h.dtype}, like="grad"
    ),
)
