"""Argument checks of the operators: errors name the argument, what came and what was wanted."""

from __future__ import annotations

from typing import Any

import torch

from shifcon_fast.ops.registry import IMPLS

FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
INTEGER = frozenset({torch.int64, torch.int32})
MASK = frozenset({torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def check_impl(impl: str) -> None:
    """``impl`` is one of the four names; whether that backend can run is known when it runs."""
    if impl not in IMPLS:
        raise ValueError(f"impl: got {impl!r}; wanted 'auto', 'reference', 'native' or 'triton'")


def check_floating(name: str, tensor: Any) -> None:
    """``tensor`` is a floating-point tensor of a dtype the operators compute with."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; wanted a torch.Tensor")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}; wanted float32, bfloat16 or float16 (float64 for checks)"
        )


def check_integer(name: str, tensor: Any) -> None:
    """``tensor`` holds language ids."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; wanted a torch.Tensor of language ids")
    if tensor.dtype not in INTEGER:
        raise TypeError(f"{name}: got dtype {tensor.dtype}; wanted int64 or int32 language ids")


def check_same_dtype(name: str, tensor: torch.Tensor, other: str, reference: torch.Tensor) -> None:
    """``tensor`` has the dtype of ``reference``."""
    if tensor.dtype != reference.dtype:
        raise TypeError(f"{name}: got dtype {tensor.dtype}; wanted {other}'s dtype {reference.dtype}")


def check_same_device(name: str, tensor: torch.Tensor, other: str, reference: torch.Tensor) -> None:
    """``tensor`` lies on the device of ``reference``."""
    if tensor.device != reference.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}; wanted it on {other}'s device {reference.device}"
        )


def check_prefix(name: str, index: torch.Tensor, x: torch.Tensor) -> None:
    """``index`` has a shape that is a prefix of ``x.shape[:-1]``: per row of the batch, or per token."""
    if index.ndim >= x.ndim or index.shape != x.shape[: index.ndim]:
        raise ValueError(
            f"{name}: got shape {tuple(index.shape)}; wanted a prefix of x.shape[:-1] = {tuple(x.shape[:-1])}"
        )


def check_scale(scale: Any) -> None:
    """``scale`` is a finite Python number >= 0."""
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale: got {type(scale).__name__}; wanted a Python float")
    if not 0 <= scale < float("inf"):  # false for NaN, and torch.compile can trace it for a changing scale
        raise ValueError(f"scale: got {scale}; wanted a finite number >= 0 (1 / temperature)")


def check_index_range(name: str, index: torch.Tensor, count: int) -> None:
    """Language ids lie in -1 ... count - 1; checked on the CPU only, where reading them needs no synchronisation.

    Called where the operator runs rather than in the Python wrapper, so compiled graphs are protected as well.
    """
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < -1 or high >= count:
        raise ValueError(
            f"{name}: got language id {low if low < -1 else high}; wanted 0 to {count - 1}, or -1 (row left alone)"
        )


def check_pair(a: Any, b: Any) -> None:
    """``a`` and ``b`` are (N, d) and (M, d), or (L, N, d) and (L, M, d), of one dtype on one device."""
    check_floating("a", a)
    if not isinstance(b, torch.Tensor) or b.dtype != a.dtype:
        check_floating("b", b)
        check_same_dtype("b", b, "a", a)
    if a.ndim not in (2, 3) or a.shape[-1] == 0:
        raise ValueError(f"a: got shape {tuple(a.shape)}; wanted (N, d) or (L, N, d) with d >= 1")
    if b.ndim != a.ndim or b.shape[-1] != a.shape[-1] or (a.ndim == 3 and b.shape[0] != a.shape[0]):
        raise ValueError(
            f"b: got shape {tuple(b.shape)}; wanted {a.ndim} dimensions that agree with a's {tuple(a.shape)} "
            "in all but the number of rows"
        )
    check_same_device("b", b, "a", a)
