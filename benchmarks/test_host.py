"""Host time of one eager call: what a launch costs before the device has anything to do (target: 15 µs on CUDA)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops


def calls(device: torch.device, gradients: bool) -> dict[str, Callable[[], Tensor]]:
    """Small calls; with ``gradients`` their inputs ask for one, so that autograd records the call."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_(gradients)

    x, residual, a, b = leaf(2, 4, 256), leaf(2, 4, 256), leaf(2, 16, 256), leaf(2, 16, 256)
    weight, shift = torch.rand(256, device=device), torch.randn(4, 256, device=device)
    index, mask = torch.tensor([1, -1], device=device), torch.ones(2, 4, dtype=torch.bool, device=device)
    mean, basis = (
        torch.randn(4, 256, device=device),
        torch.linalg.qr(torch.randn(4, 256, 16, device=device))[0],
    )
    basis = basis.contiguous()
    return {
        "add_shift_rms_norm": lambda: ops.add_shift_rms_norm(x, weight, residual, shift, index)[0],
        "masked_mean_pool": lambda: ops.masked_mean_pool(x, mask),
        "info_nce": lambda: ops.info_nce(a, b, 20.0),
        "contrastive_similarity": lambda: ops.contrastive_similarity(a, b, 20.0),
        "subspace_project": lambda: ops.subspace_project(x, mean, basis, index),
        "F.rms_norm": lambda: torch.nn.functional.rms_norm(x, (256,), weight),
    }


OPERATORS = (
    *("add_shift_rms_norm", "masked_mean_pool", "info_nce", "contrastive_similarity", "subspace_project"),
    "F.rms_norm",
)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_host_time(  # noqa: PLR0917 - pytest passes fixtures by name
    name: str,
    gradients: bool,
    benchmark: Any,
    record: Callable[..., None],
    only_warm: Callable[..., None],
    device: torch.device,
    smoke: bool,
) -> None:
    call = calls(device, gradients)[name]
    # Few enough that all launches of several operators' kernels fit into the queue: nothing waits for the device.
    count, repeats = (3, 1) if smoke else (50, 30)
    assert call().requires_grad == gradients
    only_warm(call)
    for _ in range(3):
        call()

    def several() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    best = min(several() for _ in range(repeats))
    benchmark.pedantic(call, rounds=1)
    recorded = "recorded" if gradients else "off"
    record(case=f"host time, gradients {recorded}: {name}", peer="ours", ms=best * 1e3, rounds=repeats)
