"""``info_nce``: the symmetric contrastive loss over in-batch negatives, without an N × N matrix."""

# ruff: noqa: PLR0917 - an operator's parameters are positional

from __future__ import annotations

from torch import Tensor

from shifcon_fast.ops.library import Gradients, compute_dtype, define
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
        return _operator(a[None], b[None], float(scale), bool(normalize), bool(recenter), impl)[0][0]
    return _operator(a, b, float(scale), bool(normalize), bool(recenter), impl)[0]


def _fake(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = a.new_empty((2, *a.shape[:2]), dtype=compute_dtype(a.dtype))
    return parts.new_empty(a.shape[:1]), parts, parts.new_empty(parts.shape)


def _fake_gradients(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    row_parts: Tensor,
    column_parts: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


_operator = define(
    info_nce,
    outputs=("loss", "row_parts", "column_parts"),
    fake=_fake,
    gradients=Gradients(fake=_fake_gradients, of={"a": ("a",), "b": ("b",)}, like="a"),
)
