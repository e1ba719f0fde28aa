"""``subspace_project``: move rows from one language's affine subspace to another's."""

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
)


def subspace_project(
    x: Tensor,
    mean: Tensor,
    basis: Tensor,
    source: Tensor,
    target: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """x′ = mean[t] + V_t V_tᵀ (x - mean[s]), V = basis (Chang et al. 2022, arXiv 2205.10964, section 3).

    A row whose source or target is -1 passes through bit for bit. Computed in float32, rounded once to ``x.dtype``.

    Args:
        x: (..., d) float32, bfloat16 or float16, any strides.
        mean: (K, d), any floating dtype (float32 recommended).
        basis: (K, d, k), orthonormal columns; any floating dtype. Orthonormality is not checked.
        source: language ids s, int64 or int32, shape a prefix of ``x.shape[:-1]``.
        target: language ids t, shaped as source; ``None`` is source, the projection onto a language's own subspace.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        x′, shape and dtype of x; differentiable in x, mean and basis.

    Raises:
        TypeError: an argument is not a tensor of a fitting dtype.
        ValueError: a shape, device, impl or (on the CPU) a language id does not fit.
    """
    moved: Tensor = _operator(x, mean, basis, source, target, impl)
    return moved


def _check(x: Any, mean: Any, basis: Any, source: Any, target: Any) -> None:
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}; wanted (..., d) with d >= 1")
    hidden = x.shape[-1]
    check_floating("mean", mean)
    if mean.ndim != 2 or mean.shape[1] != hidden:
        raise ValueError(f"mean: got shape {tuple(mean.shape)}; wanted (languages, {hidden})")
    check_floating("basis", basis)
    if basis.ndim != 3 or basis.shape[:2] != mean.shape:
        raise ValueError(
            f"basis: got shape {tuple(basis.shape)}; wanted ({mean.shape[0]}, {hidden}, k), a basis per row of mean"
        )
    for name, ids in (("source", source), ("target", source if target is None else target)):
        check_integer(name, ids)
        check_prefix(name, ids, x)
        check_same_device(name, ids, "x", x)
    if target is not None and target.shape != source.shape:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}; wanted source's shape {tuple(source.shape)}"
        )
    check_same_device("mean", mean, "x", x)
    check_same_device("basis", basis, "x", x)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_gradients(
    grad: Tensor, x: Tensor | None, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(grad.dtype)
    return (
        grad.new_empty(grad.shape),
        mean.new_empty(mean.shape, dtype=compute),
        basis.new_empty(basis.shape, dtype=compute),
    )


_operator = define(
    subspace_project,
    outputs=("moved",),
    fake=_fake,
    check=_check,
    language_ids={"source": "mean", "target": "mean"},
    gradients=Gradients(
        fake=_fake_gradients,
        of={"x": ("x",), "mean": ("mean",), "basis": ("basis",)},
        # The gradients of x and mean do not need x; keeping it only for the basis saves an activation.
        derived={"x": lambda x, basis: x if basis.requires_grad else None},
        like="grad",
    ),
)
