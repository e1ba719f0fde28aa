"""What the operator tests share: the error bound that every backend has to keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

ErrorRule = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture
def within_rule() -> ErrorRule:
    """Assert error(ours) <= 2 × error(plain PyTorch at the same dtype) + rounding, both against float64.

    The rounding is half an ulp of the result's dtype, which no result of that dtype can be asked to beat (on a
    dozen numbers plain PyTorch may be lucky), and four of float32, in which everything is accumulated.
    """

    def check(ours: Tensor, plain: Tensor, oracle: Tensor) -> None:
        assert ours.shape == oracle.shape
        assert oracle.dtype == torch.float64
        if oracle.numel() == 0:
            return
        error = (ours.double() - oracle).abs().max().item()
        allowed = 2 * (plain.double() - oracle).abs().max().item()
        ulps = 4 * torch.finfo(torch.float32).eps + torch.finfo(ours.dtype).eps / 2
        tiny = ulps * max(1.0, oracle.abs().max().item())
        assert error <= allowed + tiny, f"error {error:.3e}, allowed 2 x plain + tiny = {allowed + tiny:.3e}"

    return check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
