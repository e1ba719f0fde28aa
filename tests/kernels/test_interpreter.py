"""Runs the kernels' contract under Triton's interpreter, in processes of their own.

Triton decides when a kernel is decorated whether it is interpreted, so TRITON_INTERPRET must be set before imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parent / "contract"
PARTS = ("contrastive", "norm", "library", "pooling")  # the longest first


def run(part: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(CONTRACT / f"test_{part}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    with ThreadPoolExecutor(2) as pool:
        yield {part: pool.submit(run, part) for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_contract(part: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    result = runs[part].result()
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "[100%]" in result.stdout  # something was collected
