"""The kernels' contract, on a CUDA device, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).

Elsewhere these tests are not collected; ``tests/kernels/test_interpreter.py`` runs them in processes of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

ErrorRule = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture(scope="session", autouse=True)
def _interpreter_rounds_to_bfloat16() -> None:
    """Triton 3.9's interpreter truncates float32 to bfloat16, where every device rounds to nearest."""
    if not INTERPRETED:
        return
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def rounding(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (float32, bfloat16):
            return original(values, source, target, mode)
        rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view("uint16").reshape(values.shape)

    interpreter._convert_float = rounding


@pytest.fixture(autouse=True)
def _poisoned_and_deterministic() -> Iterator[None]:
    """Memory that a kernel forgot to write holds NaN, and nothing may depend on the order of threads."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def within_rule() -> ErrorRule:
    """Assert error(ours) <= 2 × error(plain PyTorch at the same dtype) + rounding, both against float64.

    The rounding is half an ulp of the result's dtype and four of float32, in which everything is accumulated.
    """

    def check(ours: Tensor, plain: Tensor, oracle: Tensor) -> None:
        assert ours.shape == oracle.shape
        assert oracle.dtype == torch.float64
        if oracle.numel() == 0:
            return
        assert torch.isfinite(ours).all()
        error = (ours.double() - oracle).abs().max().item()
        allowed = 2 * (plain.double() - oracle).abs().max().item()
        ulps = 4 * torch.finfo(torch.float32).eps + torch.finfo(ours.dtype).eps / 2
        allowed += ulps * max(1.0, oracle.abs().max().item())
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"

    return check
