"""``subspace_project`` on CUDA: calls the compiled library of ``csrc/cuda``, and says where it cannot run.

float32 is computed in float32; bfloat16 and float16 run on tensor cores with float32 sums, see
``csrc/cuda/subspace_project.cu`` for what is rounded when. A language id out of range is treated as -1: to report
it would cost a synchronisation, and nothing is read with it. Tables of another dtype or layout than the kernels
want (mean float32; basis x's dtype, contiguous, a rank that is a multiple of 16) are converted at every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shifcon_fast import _native
from shifcon_fast.ops.registry import in_place

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_OLDEST = (8, 0)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the library cannot run on ``device`` and ``dtype``, or ``None`` if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "ROCm" if torch.version.hip is not None else device.type
        return f"it is compiled for CUDA, not for {kind}"
    if dtype not in _DTYPES:
        return f"it is compiled for float32, bfloat16 and float16, not for {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"it needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return _native.load("cuda")


def forward(*args: Any) -> Any:
    """Return x′, contiguous, in x's dtype. Takes what a backend gets; with a target."""
    return _native.operator("cuda", "subspace_project")(*args)


def backward(*args: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of x (its dtype), mean and basis (float32); x is only there when the basis needs it."""
    found = _native.operator("cuda", "subspace_project_backward")(*args)
    return in_place(found, args[-3:])
