"""The operators' contract: one set of assertions that every backend has to keep.

Which backend, and where: Triton on a CUDA device, or on the CPU under its interpreter (TRITON_INTERPRET=1; Triton
decides when a kernel is decorated, so ``tests/kernels/test_interpreter.py`` runs that in processes of their own);
otherwise the compiled extension on the CPU. SHIFCON_CONTRACT=native asks for the latter where a CUDA device is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON = INTERPRETED or torch.cuda.is_available()
IMPL = os.environ.get("SHIFCON_CONTRACT", "triton" if _TRITON else "native")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for

if IMPL != "triton":
    collect_ignore_glob = ["test_triton.py"]

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
    """Memory that a kernel forgot to write holds NaN or huge numbers; nothing depends on the order of threads."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _fill_what_malloc_returns(1)
    yield
    _fill_what_malloc_returns(0)
    torch.use_deterministic_algorithms(False)


def _fill_what_malloc_returns(byte: int) -> None:
    """Tensors that the extension makes itself come from malloc unfilled: have it write 0xff ^ byte; 0 ends that."""
    perturb = -6  # M_PERTURB in glibc's malloc.h
    if IMPL == "native" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(perturb, byte)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if IMPL == "triton" and not INTERPRETED else "cpu")


@pytest.fixture
def backend(device: torch.device) -> Callable[..., str]:
    """``backend(*operators)``: the name under test; skips, with the reason, where it cannot run one of them."""

    def usable(*operators: str) -> str:
        for report in ops.backend_report():
            if (
                report.operator in operators
                and report.device.startswith(device.type)
                and report.chosen != IMPL
            ):
                reason = report.reasons[IMPL]
                if reason != f"{report.chosen} is preferred on {device.type}":
                    pytest.skip(f"{report.operator}: {IMPL}: {reason}")
        return IMPL

    return usable


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
