"""The operators on numbers below the smallest normal one, which some processors take a hundred times as long for.

"ours" reads such numbers, "ours, normal numbers" does the same work on others; both are float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops

DENORMAL = 1e-40


def norm(x: Tensor) -> Callable[[], Any]:
    weight = torch.ones(x.shape[-1])
    return lambda: ops.add_shift_rms_norm(x, weight, x)


def pool(x: Tensor) -> Callable[[], Any]:
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    return lambda: ops.masked_mean_pool(x, mask)


def similarity(x: Tensor) -> Callable[[], Any]:
    return lambda: ops.contrastive_similarity(x, x, 1.0, normalize=False)


def loss(x: Tensor) -> Callable[[], Any]:
    return lambda: ops.info_nce(x, x, 1.0, normalize=False)


def projection(x: Tensor) -> Callable[[], Any]:
    languages, width = 4, x.shape[-1]
    mean = torch.zeros(languages, width)
    basis = torch.linalg.qr(torch.randn(languages, width, 16)).Q
    index = torch.arange(x.shape[0]) % languages
    return lambda: ops.subspace_project(x, mean, basis, index)


OPERATORS = {
    "add_shift_rms_norm": norm,
    "masked_mean_pool": pool,
    "contrastive_similarity": similarity,
    "info_nce": loss,
    "subspace_project": projection,
}


@pytest.mark.parametrize("numbers", ["ours", "ours, normal numbers"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_denormals(operator: str, numbers: str, measure: Any, device: torch.device, smoke: bool) -> None:
    if device.type == "cuda":
        pytest.skip("GPUs compute with denormals at full speed; this is about processors")
    x = torch.randn(2, 8, 32) if smoke else torch.randn(8, 64, 1024)
    if numbers == "ours":
        x = x * DENORMAL
        assert (x != 0).float().mean() > 0.9, (
            "this process takes denormals for zero (torch.set_flush_denormal?)"
        )
    call = OPERATORS[operator](x)
    with torch.no_grad():
        measure([call], case=f"denormals, {operator} forward", peer=numbers)
