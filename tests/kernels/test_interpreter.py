"""Runs the operators' contract on the Triton kernels under Triton's interpreter, in processes of their own.

Triton decides when a kernel is decorated whether it is interpreted, so TRITON_INTERPRET must be set before imports.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONTRACT = Path(__file__).resolve().parents[1] / "contract"


def run(*selection: str) -> set[str]:
    """The names of the tests that passed."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "--tb=short", "-p", "no:cacheprovider", *selection],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return set(re.findall(r"^PASSED \S*?(\w+\.py::\w+)", result.stdout, re.M))


def test_every_operator_in_small() -> None:
    assert run("-m", "small", str(CONTRACT)) == {
        "test_norm.py::test_values_and_gradients",
        "test_norm.py::test_index_per_row_and_per_token",
        "test_pooling.py::test_values_and_gradient",
        "test_contrastive.py::test_loss",
        "test_contrastive.py::test_similarity",
    }


@pytest.mark.slow("runs the whole contract in Triton's interpreter")
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
    assert run("-k", selection, str(CONTRACT / f"test_{part}.py"))
