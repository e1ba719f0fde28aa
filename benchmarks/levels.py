"""The level of vector instructions that a measurement on the CPU runs at, ours and PyTorch's alike.

A machine may be *held* to a lower level than it has: the environment keeps our kernels, ATen's, oneDNN's and MKL's
below it. What is then measured is what a machine of that level does, except for its clock and its memory. It does
not hold what PyTorch asks the processor itself: a machine with AVX512 takes bfloat16 products to oneDNN, which has
none for AVX2 and is slow.
"""

from __future__ import annotations

import os

import torch

from shifcon_fast import _native

# By level, the environment that holds a process to it; every library reads it once.
HELD = {
    "avx2": {
        "SHIFCON_CPU_LEVEL": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
PREFIXES = ("OMP_", "SHIFCON_", "ATEN_", "ONEDNN_", "MKL_")  # of the variables that belong to a record


def current() -> str:
    """The level of this process: that of the compiled operators, or what ATen says where there are none."""
    level = _native.cpu_level()
    return level or torch.backends.cpu.get_cpu_capability().lower()


def held() -> bool:
    """Whether the environment holds this process to a level."""
    return any(all(os.environ.get(k) == v for k, v in wanted.items()) for wanted in HELD.values())
