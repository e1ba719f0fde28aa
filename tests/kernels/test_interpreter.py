"""Runs the kernels' contract under Triton's interpreter: in processes of their own, because Triton decides when a
kernel is decorated, before which TRITON_INTERPRET has to be set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parent / "contract"


@pytest.mark.parametrize("part", ["norm", "pooling", "contrastive", "library"])
def test_contract(part: str) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            str(CONTRACT / f"test_{part}.py"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout or "100%" in result.stdout
