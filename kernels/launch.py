"""What every launcher needs: the guard of its device, the compile options, the multiprocessors, sizes of grids."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which in a multi-GPU process need not be the tensor's."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


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
