"""What several tests of the compiled operators need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shifcon_fast import _native

NEEDS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
}


@pytest.fixture(scope="session")
def best_level() -> int:
    """The highest level that the processor says of itself, without the library; it need not be the fastest."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = set(next(line for line in about.splitlines() if line.startswith("flags")).split())
    levels, best = list(_native.LEVELS), 0
    while best < len(levels) - 1 and NEEDS[levels[best + 1]] <= flags:
        best += 1
    return best


@pytest.fixture(
    params=[
        pytest.param(
            level, marks=pytest.mark.slow("runs operator tests again at every other instruction level")
        )
        for level in _native.LEVELS
    ]
)
def run_again(request: pytest.FixtureRequest, best_level: int) -> Callable[[str], None]:
    """``run_again(file)`` runs the tests of ``file`` in another process, once per other level."""
    level = request.param
    if (problem := _native.load("cpu")) is not None:
        pytest.skip(problem)
    if os.environ.get("SHIFCON_CPU_LEVEL") is not None:
        pytest.skip("this is the process of one level; run without SHIFCON_CPU_LEVEL to start all of them")
    number = list(_native.LEVELS).index(level)
    if number > best_level or number == torch.ops.shifcon_fast_cpu.level():
        pytest.skip(f"{level} is what the other tests run, or more than this machine has")

    def run(file: str) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file],
            env={**os.environ, "SHIFCON_CPU_LEVEL": level},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
        assert "[100%]" in result.stdout  # something was collected

    return run
