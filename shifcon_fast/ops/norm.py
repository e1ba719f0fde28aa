"""``add_shift_rms_norm``: residual add, language shift and RMSNorm in one operator."""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

from typing import Any

from torch import Tensor

from shifcon_fast.ops.library import compute_dtype, define, direct_backend
from shifcon_fast.ops.registry import run, run_backward, select
from shifcon_fast.ops.validation import (
    check_floating,
    check_impl,
    check_index_range,
    check_integer,
    check_prefix,
    check_same_device,
    check_same_dtype,
)

STYLES = frozenset({"llama", "gemma", "olmo"})


def add_shift_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    shift: Tensor | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    style: str = "llama",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h = x + residual + shift[index]; y = RMSNorm(h) · weight (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    The sum is formed in float32 and rounded once to ``x.dtype``; y is the norm of that rounded h. Rows whose index
    is -1 get no shift, bit for bit. With neither residual nor shift, the returned h is ``x`` itself.

    Args:
        x: (..., d) float32, bfloat16 or float16, any strides.
        weight: (d,) any floating dtype; float32 next to a 16-bit x is fine (PEFT casts norm weights up).
        residual: (..., d), dtype of x.
        shift: (K, d) table of language shifts, any floating dtype (float32 recommended).
        index: language ids, int64 or int32, shape a prefix of ``x.shape[:-1]``; wanted exactly when shift is given.
        eps: added to the mean square, > 0.
        style: "llama": normalise in float32, round to x.dtype, multiply by weight, round to x.dtype;
            "gemma": multiply by (1 + weight) in float32, round once; "olmo": by weight in float32, round once.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (y, h), both of x's shape and dtype, whatever weight's dtype. Differentiable in x, weight, residual, shift.

    Raises:
        TypeError: an argument is not a tensor of a fitting dtype.
        ValueError: a shape, device, eps, style, impl or (on the CPU) a language id does not fit.
    """
    args = (x, weight, residual, shift, index, eps, style, impl)
    direct = direct_backend("add_shift_rms_norm", args)
    if direct is not None:
        try:
            y, h, _ = run(direct, *args[:-1])
        except Exception:
            _check(*args)
            _check_ids(shift, index)
            raise
        return y, (x if h is None else h)
    _check(*args)
    y, h, _ = _forward(x, weight, residual, shift, index, float(eps), style, impl)
    return y, (x if residual is None and shift is None else h)


def _check(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    eps: float,
    style: str,
    impl: str,
) -> None:
    check_impl(impl)
    if style not in STYLES:
        raise ValueError(f"style: got {style!r}; wanted 'llama', 'gemma' or 'olmo'")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps: got {eps}; wanted a finite number > 0")
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}; wanted (..., d) with d >= 1")
    hidden = x.shape[-1]
    check_floating("weight", weight)
    if weight.ndim != 1 or weight.shape[0] != hidden:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; wanted ({hidden},), x's last dimension")
    check_same_device("weight", weight, "x", x)
    if residual is not None:
        check_floating("residual", residual)
        check_same_dtype("residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(
                f"residual: got shape {tuple(residual.shape)}; wanted x's shape {tuple(x.shape)}"
            )
        check_same_device("residual", residual, "x", x)
    if (shift is None) != (index is None):
        given, missing = ("index", "shift") if shift is None else ("shift", "index")
        raise ValueError(f"{missing}: got None together with {given}; wanted both or neither")
    if shift is not None and index is not None:
        check_floating("shift", shift)
        if shift.ndim != 2 or shift.shape[1] != hidden:
            raise ValueError(f"shift: got shape {tuple(shift.shape)}; wanted (languages, {hidden})")
        check_same_device("shift", shift, "x", x)
        check_integer("index", index)
        check_prefix("index", index, x)
        check_same_device("index", index, "x", x)


def _check_ids(shift: Tensor | None, index: Tensor | None) -> None:
    if shift is not None and index is not None:
        check_index_range("index", index, shift.shape[0])


def _kernel(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    eps: float,
    style: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = select("add_shift_rms_norm", impl, x.device, x.dtype)
    if not backend.checks_arguments:
        _check_ids(shift, index)
    try:
        y, h, rstd = run(backend, x, weight, residual, shift, index, eps, style)
    except RuntimeError:
        _check_ids(shift, index)
        raise
    # An operator may not return its input, so an h that is x itself comes back as an empty placeholder.
    return y, x.new_empty(0) if h is None else h, rstd


def _fake(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    eps: float,
    style: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if residual is None and shift is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))


def _backward_kernel(
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
    impl: str,
) -> list[Tensor]:
    gradients = run_backward(
        "add_shift_rms_norm",
        impl,
        h.device,
        h.dtype,
        grad_y,
        grad_h,
        h,
        weight,
        rstd,
        index,
        languages,
        style,
        need_input,
        need_weight,
        need_shift,
    )
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(
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
    impl: str,
) -> list[Tensor]:
    gradients = [h.new_empty(h.shape)] if need_input else []
    if need_weight:
        gradients.append(rstd.new_empty(weight.shape))
    if need_shift:
        gradients.append(rstd.new_empty((languages, h.shape[-1])))
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, residual, shift, index, _, style, impl = inputs
    _, h, rstd = output
    if residual is None and shift is None:  # h is a placeholder, and whoever uses x has x's own gradient
        ctx.mark_non_differentiable(h, rstd)
        h = x
    else:
        ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(h, weight, rstd, index)
    ctx.shift = (0, None) if shift is None else (shift.shape[0], shift.dtype)
    ctx.style, ctx.impl = style, impl
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    need_x, need_weight, need_residual, need_shift = ctx.needs_input_grad[:4]
    need_weight = need_weight and grad_y is not None
    if grad_y is None and grad_h is None:
        return (None,) * 8
    h, weight, rstd, index = ctx.saved_tensors
    languages, shift_dtype = ctx.shift
    need_input = need_x or need_residual
    gradients = iter(
        _backward(
            grad_y,
            grad_h,
            h,
            weight,
            rstd,
            index,
            languages,
            ctx.style,
            need_input,
            need_weight,
            need_shift,
            ctx.impl,
        )
    )
    grad_input = next(gradients) if need_input else None
    grad_weight = next(gradients).to(weight.dtype) if need_weight else None
    grad_shift = next(gradients).to(shift_dtype) if need_shift else None
    return (
        grad_input if need_x else None,
        grad_weight,
        grad_input if need_residual else None,
        grad_shift,
        *(None,) * 4,
    )


_forward = define(
    "add_shift_rms_norm(Tensor x, Tensor weight, Tensor? residual, Tensor? shift, Tensor? index, float eps, "
    "str style, str impl) -> (Tensor y, Tensor h, Tensor rstd)",
    _kernel,
    _fake,
    _autograd,
    _setup_context,
)
_backward = define(
    "add_shift_rms_norm_backward(Tensor? grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor rstd, "
    "Tensor? index, SymInt languages, str style, bool need_input, bool need_weight, bool need_shift, "
    "str impl) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
