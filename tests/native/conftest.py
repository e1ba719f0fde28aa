"""What several tests of the compiled operators need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from shifcon_fast import _native


@pytest.fixture(
    params=[
        pytest.param(
            level, marks=pytest.mark.slow("runs operator tests again at every instruction level below")
        )
        for level in _native.LEVELS
    ]
)
def run_again(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``run_again(file)`` runs the tests of ``file`` in another process, once per level below this process's."""
    level = request.param
    if (problem := _native.load("cpu")) is not None:
        pytest.skip(problem)
    if os.environ.get("SHIFCON_CPU_LEVEL") is not None:
        pytest.skip("this is the process of one level; run without SHIFCON_CPU_LEVEL to start all of them")
    if level not in list(_native.LEVELS)[: torch.ops.shifcon_fast_cpu.level()]:
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
