"""``add_shift_rms_norm``: residual add, language shift and RMSNorm in one operator."""

# ruff: noqa: PLR0917 - an operator's parameters are positional

from __future__ import annotations

from typing import Any

from torch import Tensor

from shifcon_fast.ops.library import Gradients, compute_dtype, define
from shifcon_fast.ops.validation import (
    check_floating,
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
    y, h, _ = _operator(x, weight, residual, shift, index, eps, style, impl)
    return y, (x if residual is None and shift is None else h)


def _check(x: Any, weight: Any, residual: Any, shift: Any, index: Any, eps: float, style: str) -> None:
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
    if shift is not None:
        check_floating("shift", shift)
        if shift.ndim != 2 or shift.shape[1] != hidden:
            raise ValueError(f"shift: got shape {tuple(shift.shape)}; wanted (languages, {hidden})")
        check_same_device("shift", shift, "x", x)
        check_integer("index", index)
        check_prefix("index", index, x)
        check_same_device("index", index, "x", x)


def _fake(x: Tensor, residual: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if residual is None and shift is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))


def _fake_gradients(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    index: Tensor | None,
    languages: int,
    style: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        rstd.new_empty(weight.shape),
        rstd.new_empty((languages, h.shape[-1])),
    )


def _normed(x: Tensor, residual: Tensor | None, shift: Tensor | None, h: Tensor) -> Tensor:
    return x if residual is None and shift is None else h


_operator = define(
    add_shift_rms_norm,
    outputs=("y", "h", "rstd"),
    fake=_fake,
    check=_check,
    language_ids={"index": "shift"},
    gradients=Gradients(
        fake=_fake_gradients,
        of={"input": ("x", "residual"), "weight": ("weight",), "shift": ("shift",)},
        through={"weight": "y"},
        derived={"h": _normed, "languages": lambda shift: 0 if shift is None else shift.shape[0]},
        like="h",
    ),
)
