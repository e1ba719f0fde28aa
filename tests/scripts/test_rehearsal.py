"""The tests of ``tests/gpu`` run on the CPU as far as they can: a first run on a device then tests the device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).resolve().parents[1] / "gpu"


@pytest.mark.slow("runs the tests for a GPU on the CPU, as far as that goes")
@pytest.mark.parametrize("rehearsed", [True, False])
def test_tests_for_the_device(rehearsed: bool) -> None:
    """Without a rehearsal and without a device every test is collected, and skipped with the reason."""
    environment = {**os.environ, "SHIFCON_REHEARSE": str(int(rehearsed)), "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--import-mode=importlib",
        "-rs",
        "--tb=short",
        "-o",
        "addopts=",
    ]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(GPU_TESTS)],
        env={name: value for name, value in environment.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "needs a CUDA device: scripts/gpu_check.sh runs it" in result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    if rehearsed:
        assert passed is not None
        assert int(passed[1]) >= 30
    else:
        assert passed is None
