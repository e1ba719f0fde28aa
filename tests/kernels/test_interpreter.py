"""Runs the operators' contract on the Triton kernels under Triton's interpreter, in processes of their own.

Triton decides when a kernel is decorated whether it is interpreted, so TRITON_INTERPRET must be set before imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONTRACT = Path(__file__).resolve().parents[1] / "contract"


@pytest.mark.parametrize(
    ("part", "selection"),
    [
        ("contrastive", "test_loss"),
        ("contrastive", "not test_loss"),
        ("norm", ""),
        ("library", ""),
        ("pooling", ""),
        ("triton", ""),
    ],
)
def test_contract(part: str, selection: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", selection]
    result = subprocess.run(
        [*command, str(CONTRACT / f"test_{part}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "[100%]" in result.stdout  # something was collected
