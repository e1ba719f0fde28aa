"""``contrastive_similarity``: the batched logits that ``info_nce`` is taken over, written out."""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

from typing import Any

from torch import Tensor

from shifcon_fast.ops.library import compute_dtype, define
from shifcon_fast.ops.registry import run_backward, run_forward
from shifcon_fast.ops.validation import check_impl, check_pair, check_scale


def contrastive_similarity(
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    normalize: bool = True,
    recenter: bool = False,
    impl: str = "auto",
) -> Tensor:
    """S = scale · a bᵀ, with the rows made unit length and b re-centred as in :func:`info_nce`.

    Args:
        a: (L, N, d) or (N, d), float32, bfloat16 or float16.
        b: (L, M, d) or (M, d), dtype of a.
        scale: finite, >= 0.
        normalize: make the rows unit length first (S is then the cosine, times scale); a zero row stays zero.
        recenter: b ← b - mean(b) + mean(a) after normalising; means over M and over N.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (L, N, M) or (N, M), float32 (float64 for float64 inputs), differentiable in a and b.

    Raises:
        TypeError: an argument is not a tensor of a fitting dtype, or scale is not a number.
        ValueError: a shape, device, scale or impl does not fit.
    """
    check_impl(impl)
    check_scale(scale)
    check_pair(a, b)
    if a.ndim == 2:
        return _forward(a[None], b[None], float(scale), bool(normalize), bool(recenter), impl)[0]
    return _forward(a, b, float(scale), bool(normalize), bool(recenter), impl)


def _kernel(a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool, impl: str) -> Tensor:
    return run_forward("contrastive_similarity", impl, a, a, b, scale, normalize, recenter)


def _fake(a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool, impl: str) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=compute_dtype(a.dtype))


def _backward_kernel(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
    impl: str,
) -> list[Tensor]:
    options = (scale, normalize, recenter, need_a, need_b)
    gradients = run_backward("contrastive_similarity", impl, a.device, a.dtype, grad, a, b, *options)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
    impl: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in ((a, need_a), (b, need_b)) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *ctx.options, ctx.impl = inputs
    ctx.save_for_backward(a, b)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_a, need_b = ctx.needs_input_grad[:2]
    gradients = iter(_backward(grad, *ctx.saved_tensors, *ctx.options, need_a, need_b, ctx.impl))
    grad_a = next(gradients) if need_a else None
    grad_b = next(gradients) if need_b else None
    return grad_a, grad_b, *(None,) * 4


_forward = define(
    "contrastive_similarity(Tensor a, Tensor b, float scale, bool normalize, bool recenter, str impl) -> Tensor",
    _kernel,
    _fake,
    _autograd,
    _setup_context,
)
_backward = define(
    "contrastive_similarity_backward(Tensor grad, Tensor a, Tensor b, float scale, bool normalize, bool recenter, "
    "bool need_a, bool need_b, str impl) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
