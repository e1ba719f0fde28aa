"""Host time of one eager call: what a launch costs before the device has anything to do (target: 15 µs on CUDA)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shifcon_fast import ops


def calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    x, residual = torch.randn(2, 2, 4, 256, device=device)
    weight, shift = torch.rand(256, device=device), torch.randn(4, 256, device=device)
    index, mask = torch.tensor([1, -1], device=device), torch.ones(2, 4, dtype=torch.bool, device=device)
    a, b = torch.randn(2, 2, 16, 256, device=device)
    return {
        "add_shift_rms_norm": lambda: ops.add_shift_rms_norm(x, weight, residual, shift, index),
        "masked_mean_pool": lambda: ops.masked_mean_pool(x, mask),
        "info_nce": lambda: ops.info_nce(a, b, 20.0),
        "contrastive_similarity": lambda: ops.contrastive_similarity(a, b, 20.0),
        "F.rms_norm": lambda: torch.nn.functional.rms_norm(x, (256,), weight),
    }


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "name", ["add_shift_rms_norm", "masked_mean_pool", "info_nce", "contrastive_similarity", "F.rms_norm"]
)
def test_host_time(name: str, gradients: bool, benchmark: Any, device: torch.device, smoke: bool) -> None:
    call = calls(device)[name]
    count = 3 if smoke else 500
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            call()

        def several() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) / count

        best = min(several() for _ in range(1 if smoke else 5))
        benchmark.pedantic(call, rounds=1)
    benchmark.extra_info.update(
        case=f"host time, gradients {'recorded' if gradients else 'off'}: {name}", peer="ours", ms=best * 1e3
    )
