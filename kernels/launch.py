"""What every launcher needs: the launch, the guard of its device, compile options, sizes of grids."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

_NOTHING: AbstractContextManager[None] = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which in a multi-GPU process need not be the tensor's."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


class CachedLaunch:
    """A Triton kernel, for whose variant Triton is asked once: that saves the host microseconds a launch.

    ``kernel[grid](*arguments, **constants)`` as in Triton: pointers and numbers by position, ``constexpr``
    parameters and compile options by name. To find the compiled variant Triton inspects every argument, its knobs
    and its hooks each time. Here a dictionary has it, by all that Triton (3.5 to 3.9) specialises on for NVIDIA:
    the device; the constants; a pointer's dtype, and whether it is a multiple of 16 bytes; whether a number is 1, a
    multiple of 16, fits 32 bits. It is launched as Triton's tutorials launch what they have compiled, launch hooks
    included (https://triton-lang.org/main/getting-started/tutorials/02-fused-softmax.html). Knobs turned after a
    variant's first launch are not seen.

    Elsewhere Triton launches: AMD's variants depend on the size of a tensor's storage as well, other releases of
    Triton may specialise on more.
    """

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> partial[Any]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
        device = arguments[0].device
        if not _caches(device.type):
            return self.kernel[grid](*arguments, **constants)
        parts: list[Any] = [device, *constants.items()]
        for value in arguments:
            kind = type(value)
            if kind is int:
                parts.append((value == 1, value & 15 == 0, -_TWO_31 <= value < _TWO_31))
            elif isinstance(value, Tensor):
                parts += (value.dtype, value.data_ptr() & 15 == 0)
            else:
                parts.append(kind)
        key = tuple(parts)
        known = self._compiled.get(key)
        if known is not None:
            compiled, last = known
            compiled[grid + _ONES[len(grid) :]](*arguments, *last)
            return compiled
        compiled = self.kernel[grid](*arguments, **constants)
        if compiled is not None:  # a hook of Triton's may have kept it from compiling
            last = tuple(constants[name] for name in self.kernel.arg_names[len(arguments) :])
            self._compiled[key] = compiled, last
        return compiled


_TWO_31 = 2**31
_ONES = (1, 1, 1)


def _is_compared(release: str) -> bool:
    """Whether ``tests/kernels/test_launch.py`` has passed with this release of Triton."""
    major, minor = release.split(".")[:2]
    return (3, 5) <= (int(major), int(minor)) <= (3, 9)


_COMPARED = _is_compared(triton.__version__)


def _caches(device_type: str) -> bool:
    return _COMPARED and device_type == "cuda" and torch.version.hip is None


def cached_launch(kernel: Any) -> Any:
    """Decorates a kernel that is launched; an interpreted one has nothing to cache."""
    return CachedLaunch(kernel) if isinstance(kernel, JITFunction) else kernel


def options(threads: int, stages: int = 1, fuse: bool = True) -> dict[str, int | bool]:
    """Compile options of a launch.

    Triton counts warps: 32 threads each on NVIDIA, 64 on AMD, and no program may have over 1,024 threads. Whether
    multiplications fuse with additions is said each time because Triton 3.10 turns its default around.
    """
    return {"num_warps": threads // _warp_size(), "num_stages": stages, "enable_fp_fusion": fuse}


def _warp_size() -> int:
    return 64 if torch.version.hip else 32


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 132 (an H100 or H200) where there is no device to ask."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# Triton's own, which also work inside of kernels, take microseconds a call on the host, and a launcher has many.
def ceil_div(dividend: int, divisor: int) -> int:
    """dividend / divisor, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number ≥ 1."""
    return 1 << (number - 1).bit_length()
