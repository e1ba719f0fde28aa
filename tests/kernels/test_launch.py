"""Sizes of grids, against Triton's own functions, which are slower on the host."""

from __future__ import annotations

import pytest

triton = pytest.importorskip(
    "triton", reason="the sizes are compared with those of triton; pip install triton"
)

from shifcon_fast.kernels import launch  # noqa: E402 - needs Triton


def test_sizes_are_those_of_triton() -> None:
    for number in (*range(1, 300), 4095, 4096, 4097, 2**31 - 1, 2**31, 2**40 + 1):
        assert launch.next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 2, 3, 64, 132):
            assert launch.ceil_div(number, divisor) == triton.cdiv(number, divisor)
    assert launch.ceil_div(0, 8) == 0
