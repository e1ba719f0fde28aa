"""The native backend: registers the compiled operators of csrc/, and says where they cannot run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shifcon_fast import _native
from shifcon_fast.ops import native_cuda
from shifcon_fast.ops.registry import in_place, register_backend

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_STYLES = {"llama": 0, "gemma": 1, "olmo": 2}

Gradients = tuple[Tensor | None, ...]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled operators cannot run on ``device`` and ``dtype``, or ``None`` if they can."""
    if device.type != "cpu":
        return f"it is compiled for the CPU, not for {device.type}"
    if dtype not in _DTYPES:
        return f"it is compiled for float32, bfloat16 and float16, not for {dtype}"
    return _native.load("cpu")


def norm_forward(*args: Any) -> Any:
    """The compiled norm takes the number of a style."""
    return _native.operator("cpu", "add_shift_rms_norm")(*args[:-1], _STYLES[args[-1]])


def norm_backward(grad_y: Tensor | None, *args: Any) -> Gradients:
    """Likewise; without a gradient of y there is none of the weight."""
    need_input, need_weight, need_shift = args[-3:]
    needs = need_input, need_weight and grad_y is not None, need_shift
    operator = _native.operator("cpu", "add_shift_rms_norm_backward")
    return in_place(operator(grad_y, *args[:-4], _STYLES[args[-4]], *needs), needs)


register_backend(
    "add_shift_rms_norm",
    "native",
    forward=norm_forward,
    backward=norm_backward,
    unavailable=unavailable,
    checks_arguments=True,
    calls_torch=False,
)


def projection_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The projection is compiled for CUDA, too."""
    return (native_cuda.unavailable if device.type == "cuda" else unavailable)(device, dtype)


def projection_forward(x: Tensor, *args: Any) -> Any:
    """The compiled projection always takes a target."""
    *tables, source, target = args
    run = native_cuda.forward if x.is_cuda else _native.operator("cpu", "subspace_project")
    return run(x, *tables, source, _target(source, target))


def projection_backward(grad: Tensor, *args: Any) -> Gradients:
    """Likewise."""
    *others, source, target, need_x, need_mean, need_basis = args
    args = (*others, source, _target(source, target), need_x, need_mean, need_basis)
    if grad.is_cuda:
        return native_cuda.backward(grad, *args)
    found = _native.operator("cpu", "subspace_project_backward")(grad, *args)
    return in_place(found, args[-3:])


def _target(source: Tensor, target: Tensor | None) -> Tensor:
    if target is not None and target.shape != source.shape:
        raise ValueError("target: wanted source's shape")
    return source if target is None else target


register_backend(
    "subspace_project",
    "native",
    forward=projection_forward,
    backward=projection_backward,
    unavailable=projection_unavailable,
    checks_arguments=True,
    calls_torch=False,
)


def _register_as_it_is(operator: str, gradients: int) -> None:
    """An operator whose compiled functions take what a backend gets, and return a list of ``gradients``, or one."""

    def forward(*args: Any) -> Any:
        return _native.operator("cpu", operator)(*args)

    def backward(*args: Any) -> Any:
        found = _native.operator("cpu", f"{operator}_backward")(*args)
        return in_place(found, args[-gradients:]) if gradients > 1 else found

    register_backend(
        operator, "native", forward=forward, backward=backward, unavailable=unavailable, calls_torch=False
    )


_register_as_it_is("masked_mean_pool", gradients=1)
_register_as_it_is("info_nce", gradients=2)
_register_as_it_is("contrastive_similarity", gradients=2)
