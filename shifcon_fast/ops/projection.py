"""``subspace_project``: move rows from one language's affine subspace to another's."""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

from typing import Any

from torch import Tensor

from shifcon_fast.ops.library import compute_dtype, define
from shifcon_fast.ops.registry import run_backward, run_forward
from shifcon_fast.ops.validation import (
    check_floating,
    check_impl,
    check_index_range,
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
    check_impl(impl)
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
    return _forward(x, mean, basis, source, target, impl)


def _kernel(
    x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor | None, impl: str
) -> Tensor:
    check_index_range("source", source, mean.shape[0])
    if target is not None:
        check_index_range("target", target, mean.shape[0])
    return run_forward(
        "subspace_project", impl, x, x, mean, basis, source, source if target is None else target
    )


def _fake(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor | None, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_kernel(
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor,
    basis: Tensor,
    source: Tensor,
    target: Tensor | None,
    need_x: bool,
    need_mean: bool,
    need_basis: bool,
    impl: str,
) -> list[Tensor]:
    to = source if target is None else target
    needs = (need_x, need_mean, need_basis)
    gradients = run_backward(
        "subspace_project", impl, grad.device, grad.dtype, grad, x, mean, basis, source, to, *needs
    )
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor,
    basis: Tensor,
    source: Tensor,
    target: Tensor | None,
    need_x: bool,
    need_mean: bool,
    need_basis: bool,
    impl: str,
) -> list[Tensor]:
    compute = compute_dtype(grad.dtype)
    gradients = [grad.new_empty(grad.shape)] if need_x else []
    gradients += [
        table.new_empty(table.shape, dtype=compute)
        for table, needed in ((mean, need_mean), (basis, need_basis))
        if needed
    ]
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, basis, source, target, ctx.impl = inputs
    # The gradients of x and mean do not need x; keeping it only for the basis saves an activation.
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, mean, basis, source, target)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors  # once: under checkpointing a second look recomputes, and is refused
    _, mean, basis, _, _ = saved
    gradients = iter(_backward(grad, *saved, *needs, ctx.impl))
    grad_x = next(gradients) if needs[0] else None
    grad_mean = next(gradients).to(mean.dtype) if needs[1] else None
    grad_basis = next(gradients).to(basis.dtype) if needs[2] else None
    return grad_x, grad_mean, grad_basis, None, None, None


_forward = define(
    "subspace_project(Tensor x, Tensor mean, Tensor basis, Tensor source, Tensor? target, str impl) -> Tensor",
    _kernel,
    _fake,
    _autograd,
    _setup_context,
)
_backward = define(
    "subspace_project_backward(Tensor grad, Tensor? x, Tensor mean, Tensor basis, Tensor source, Tensor? target, "
    "bool need_x, bool need_mean, bool need_basis, str impl) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
