"""The native backend: registers the compiled operators of csrc/, and says where they cannot run."""

# ruff: noqa: PLR0917 - the arguments follow the operators' schemas, which are positional

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shifcon_fast import _native
from shifcon_fast.ops import native_cuda
from shifcon_fast.ops.registry import register_backend

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_STYLES = {"llama": 0, "gemma": 1, "olmo": 2}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled operators cannot run on ``device`` and ``dtype``, or ``None`` if they can."""
    if device.type != "cpu":
        return f"it is compiled for the CPU, not for {device.type}"
    if dtype not in _DTYPES:
        return f"it is compiled for float32, bfloat16 and float16, not for {dtype}"
    return _native.load("cpu")


@cache
def _operator(name: str) -> Callable[..., Any]:
    """What calls the compiled operator; asking ``torch.ops`` at every call costs a microsecond."""
    overload = getattr(torch.ops.shifcon_fast_cpu, name).default
    operator: Callable[..., Any] = getattr(overload, "_op", overload)  # without a Python frame in between
    return operator


def norm_forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    eps: float,
    style: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    y, h, rstd = _operator("add_shift_rms_norm")(x, weight, residual, shift, index, eps, _STYLES[style])
    return y, (None if residual is None and shift is None else h), rstd


def norm_backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    found = iter(
        _operator("add_shift_rms_norm_backward")(
            grad_y,
            grad_h,
            h,
            weight,
            rstd,
            index,
            languages,
            _STYLES[style],
            need_input,
            need_weight,
            need_shift,
        )
    )
    needs = (need_input, need_weight and grad_y is not None, need_shift)
    grad_input, grad_weight, grad_shift = (next(found) if needed else None for needed in needs)
    return grad_input, grad_weight, grad_shift


register_backend(
    "add_shift_rms_norm",
    "native",
    forward=norm_forward,
    backward=norm_backward,
    unavailable=unavailable,
    checks_arguments=True,
    calls_torch=False,
)


def pool_forward(h: Tensor, mask: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    pooled, factor = _operator("masked_mean_pool")(h, mask, normalize)
    return pooled, factor


def pool_backward(
    grad: Tensor, pooled: Tensor, factor: Tensor, mask: Tensor, dtype: torch.dtype, normalize: bool
) -> Tensor:
    gradient: Tensor = _operator("masked_mean_pool_backward")(grad, pooled, factor, mask, dtype, normalize)
    return gradient


register_backend(
    "masked_mean_pool", "native", forward=pool_forward, backward=pool_backward, unavailable=unavailable
)


def projection_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The projection is compiled for CUDA, too."""
    return (native_cuda.unavailable if device.type == "cuda" else unavailable)(device, dtype)


def projection_forward(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    if x.is_cuda:
        return native_cuda.forward(x, mean, basis, source, target)
    moved: Tensor = _operator("subspace_project")(x, mean, basis, source, target)
    return moved


def projection_backward(
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor,
    basis: Tensor,
    source: Tensor,
    target: Tensor,
    need_x: bool,
    need_mean: bool,
    need_basis: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs = (need_x, need_mean, need_basis)
    if grad.is_cuda:
        return native_cuda.backward(grad, x, mean, basis, source, target, *needs)
    found = iter(_operator("subspace_project_backward")(grad, x, mean, basis, source, target, *needs))
    grad_x, grad_mean, grad_basis = (next(found) if needed else None for needed in needs)
    return grad_x, grad_mean, grad_basis


register_backend(
    "subspace_project",
    "native",
    forward=projection_forward,
    backward=projection_backward,
    unavailable=projection_unavailable,
    checks_arguments=True,
    calls_torch=False,
)


def similarity_forward(a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool) -> Tensor:
    similarity: Tensor = _operator("contrastive_similarity")(a, b, scale, normalize, recenter)
    return similarity


def similarity_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    found = iter(
        _operator("contrastive_similarity_backward")(grad, a, b, scale, normalize, recenter, need_a, need_b)
    )
    return next(found) if need_a else None, next(found) if need_b else None


def nce_forward(
    a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss, row_parts, column_parts = _operator("info_nce")(a, b, scale, normalize, recenter)
    return loss, row_parts, column_parts


def nce_backward(
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
) -> tuple[Tensor | None, Tensor | None]:
    found = iter(
        _operator("info_nce_backward")(
            grad, a, b, row_parts, column_parts, scale, normalize, recenter, need_a, need_b
        )
    )
    return next(found) if need_a else None, next(found) if need_b else None


for _name, _forward, _backward in (
    ("contrastive_similarity", similarity_forward, similarity_backward),
    ("info_nce", nce_forward, nce_backward),
):
    register_backend(
        _name, "native", forward=_forward, backward=_backward, unavailable=unavailable, calls_torch=False
    )
