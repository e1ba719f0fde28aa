"""What the Triton kernels promise beyond the operators' contract."""

from __future__ import annotations

import pytest
import torch


def test_a_language_outside_the_table_shows_as_nan_and_reads_nothing(device: torch.device) -> None:
    from shifcon_fast.kernels import add_shift_rms_norm as kernel  # the public call checks ids on the CPU

    x, index = torch.randn(4, 33, device=device), torch.tensor([0, 2, -2, -1], device=device)
    shift, weight = torch.randn(2, 33, device=device), torch.ones(33, device=device)
    y, h, _ = kernel.forward(x, weight, None, shift, index, 1e-6, "llama")
    assert h is not None
    assert torch.isnan(h[1:3]).all()
    assert torch.isnan(y[1:3]).all()
    assert torch.isfinite(h[[0, 3]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stripes_and_groups_of_problems_do_not_change_the_numbers(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Small budgets: 300 rows in stripes of 128, one problem at a time."""
    from shifcon_fast.kernels import info_nce as kernel

    a = torch.randn(2, 300, 24, device=device)
    b = a + torch.randn(2, 300, 24, device=device)
    a, b = (a / 24**0.25).to(dtype), (b / 24**0.25).to(dtype)
    before = kernel._STRIPE_ROWS, kernel._STRIPE_BYTES
    results = []
    for limits in (before, (128, 1)):
        kernel._STRIPE_ROWS, kernel._STRIPE_BYTES = limits
        try:
            loss, rows, columns = kernel.forward(a, b, 10.0, True, True)
            grads = kernel.backward(loss, a, b, rows, columns, 10.0, True, True, True, True)
        finally:
            kernel._STRIPE_ROWS, kernel._STRIPE_BYTES = before
        results.append([loss, rows.sum(0), columns.sum(0), *grads])
    for whole, striped in zip(*results, strict=True):
        torch.testing.assert_close(
            striped.float(),
            whole.float(),
            rtol=2e-2 if dtype != torch.float32 else 1e-5,
            atol=1e-4 if dtype != torch.float32 else 1e-7,
        )
