"""``contrastive_similarity``: the batched logits that ``info_nce`` is taken over, written out."""

# ruff: noqa: PLR0917 - an operator's parameters are positional

from __future__ import annotations

from torch import Tensor

from shifcon_fast.ops.library import Gradients, compute_dtype, define
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
        return _operator(a[None], b[None], float(scale), bool(normalize), bool(recenter), impl)[0]
    return _operator(a, b, float(scale), bool(normalize), bool(recenter), impl)


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=compute_dtype(a.dtype))


def _fake_gradients(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


_operator = define(
    contrastive_similarity,
    outputs=("similarity",),
    fake=_fake,
    gradients=Gradients(fake=_fake_gradients, of={"a": ("a",), "b": ("b",)}, like="a"),
)
