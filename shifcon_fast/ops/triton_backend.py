"""The Triton backend: registers the kernels of :mod:`shifcon_fast.kernels`, and says where they cannot run.

Nothing of Triton is imported until an operator runs on it or a report asks about it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from shifcon_fast.ops.registry import register_backend

_OPERATORS = ("add_shift_rms_norm", "masked_mean_pool", "info_nce", "contrastive_similarity")
_WITH_PRODUCTS = frozenset({"info_nce", "contrastive_similarity"})  # of PyTorch's, which autocast would round
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@cache
def _kernels(operator: str) -> Any:
    return import_module(f"shifcon_fast.kernels.{operator}")


def _launcher(operator: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(_kernels(operator), name)(*args)

    return launch


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on ``device`` and ``dtype``, or ``None`` if they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "Triton needs a GPU (on the CPU it runs interpreted, with TRITON_INTERPRET=1 set before the start)"
    if device.type not in ("cpu", "cuda"):
        return f"the kernels are written for CUDA and ROCm devices, not for {device.type}"
    if dtype not in _DTYPES:
        return f"the kernels have variants for float32, bfloat16 and float16, not for {dtype}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"the kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return None


for _operator in _OPERATORS:
    register_backend(
        _operator,
        "triton",
        forward=_launcher(_operator, "forward"),
        backward=_launcher(_operator, "backward"),
        unavailable=unavailable,
        calls_torch=_operator in _WITH_PRODUCTS,
    )
