"""``info_nce``: the symmetric contrastive loss over in-batch negatives, without an N × N matrix."""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

from typing import Any

from torch import Tensor

from shifcon_fast.ops.library import compute_dtype, define
from shifcon_fast.ops.registry import run_backward, run_forward
from shifcon_fast.ops.validation import check_impl, check_pair, check_scale


def info_nce(
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    normalize: bool = True,
    recenter: bool = False,
    impl: str = "auto",
) -> Tensor:
    """loss = ½ [CE(S, diag) + CE(Sᵀ, diag)], S = scale · a bᵀ (InfoNCE, arXiv 1807.03748, symmetric as in CLIP).

    Row i of a and row i of b are the positives, everything else in the batch the negatives. Exact: S is formed
    tile by tile, in float32, and never held when N is large.

    Args:
        a, b: (N, d), or (L, N, d) for L independent problems in one call; float32, bfloat16 or float16, N >= 1.
        scale: 1 / temperature, finite, >= 0.
        normalize: make the rows unit length first; a zero row stays zero, with zero gradient.
        recenter: b ← b - mean(b) + mean(a) after normalising, means over N, not normalised again (the ``pooled``
            mode of the ShifCon authors' code); gradients flow through the means.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        () or (L,) float32 (float64 for float64 inputs), differentiable in a and b.

    Raises:
        TypeError: an argument is not a tensor of a fitting dtype, or scale is not a number.
        ValueError: a shape, device, scale or impl does not fit.
    """
    check_impl(impl)
    check_scale(scale)
    check_pair(a, b)
    if a.shape != b.shape or a.shape[-2] == 0:
        raise ValueError(
            f"b: got shape {tuple(b.shape)} next to a's {tuple(a.shape)}; wanted equal shapes with at least one row"
        )
    if a.ndim == 2:
        return _forward(a[None], b[None], float(scale), bool(normalize), bool(recenter), impl)[0][0]
    return _forward(a, b, float(scale), bool(normalize), bool(recenter), impl)[0]


def _kernel(
    a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return run_forward("info_nce", impl, a, a, b, scale, normalize, recenter)


def _fake(
    a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    parts = a.new_empty((2, *a.shape[:2]), dtype=compute_dtype(a.dtype))
    return parts.new_empty(a.shape[:1]), parts, parts.new_empty(parts.shape)


def _backward_kernel(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    row_parts: Tensor,
    column_parts: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
    impl: str,
) -> list[Tensor]:
    gradients = run_backward(
        "info_nce",
        impl,
        a.device,
        a.dtype,
        grad,
        a,
        b,
        row_parts,
        column_parts,
        scale,
        normalize,
        recenter,
        need_a,
        need_b,
    )
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    row_parts: Tensor,
    column_parts: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
    impl: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in ((a, need_a), (b, need_b)) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, *ctx.options, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(a, b, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    need_a, need_b = ctx.needs_input_grad[:2]
    gradients = iter(_backward(grad, *ctx.saved_tensors, *ctx.options, need_a, need_b, ctx.impl))
    grad_a = next(gradients) if need_a else None
    grad_b = next(gradients) if need_b else None
    return grad_a, grad_b, *(None,) * 4


_forward = define(
    "info_nce(Tensor a, Tensor b, float scale, bool normalize, bool recenter, str impl) "
    "-> (Tensor loss, Tensor row_parts, Tensor column_parts)",
    _kernel,
    _fake,
    _autograd,
    _setup_context,
)
_backward = define(
    "info_nce_backward(Tensor grad, Tensor a, Tensor b, Tensor row_parts, Tensor column_parts, float scale, "
    "bool normalize, bool recenter, bool need_a, bool need_b, str impl) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
