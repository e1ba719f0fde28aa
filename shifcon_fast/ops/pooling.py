"""``masked_mean_pool``: the mean over the tokens a mask selects."""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shifcon_fast.ops.library import compute_dtype, define
from shifcon_fast.ops.registry import run_backward, run_forward
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
    return _forward(h, mask, bool(normalize), impl)[0]


def _kernel(h: Tensor, mask: Tensor, normalize: bool, impl: str) -> tuple[Tensor, Tensor]:
    return run_forward("masked_mean_pool", impl, h, h, mask, normalize)


def _fake(h: Tensor, mask: Tensor, normalize: bool, impl: str) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(h.dtype)
    batch, _, hidden = h.shape
    return h.new_empty((batch, hidden), dtype=compute), h.new_empty((batch,), dtype=compute)


def _backward_kernel(
    grad: Tensor, pooled: Tensor, factor: Tensor, mask: Tensor, dtype: torch.dtype, normalize: bool, impl: str
) -> Tensor:
    return run_backward(
        "masked_mean_pool", impl, grad.device, dtype, grad, pooled, factor, mask, dtype, normalize
    )


def _backward_fake(
    grad: Tensor, pooled: Tensor, factor: Tensor, mask: Tensor, dtype: torch.dtype, normalize: bool, impl: str
) -> Tensor:
    return grad.new_empty((*mask.shape, grad.shape[-1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, mask, ctx.normalize, ctx.impl = inputs
    ctx.dtype = h.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, mask)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 4
    pooled, factor, mask = ctx.saved_tensors
    return _backward(grad, pooled, factor, mask, ctx.dtype, ctx.normalize, ctx.impl), None, None, None


_forward = define(
    "masked_mean_pool(Tensor h, Tensor mask, bool normalize, str impl) -> (Tensor pooled, Tensor factor)",
    _kernel,
    _fake,
    _autograd,
    _setup_context,
)
_backward = define(
    "masked_mean_pool_backward(Tensor grad, Tensor pooled, Tensor factor, Tensor mask, ScalarType dtype, "
    "bool normalize, str impl) -> Tensor",
    _backward_kernel,
    _backward_fake,
)
