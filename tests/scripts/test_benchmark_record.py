"""What a benchmark leaves in its record: time with its spread, and shares of ceilings measured in the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SUITE = """
import pytest
import torch


def test_copy(measure, device):
    source = torch.randn(2**16, device=device)
    target = torch.empty_like(source)
    measure([lambda: target.copy_(source)], case="copy 65536", peer="ours", moved=2 * source.nbytes)


def test_product(measure, device):
    a, b = torch.randn(2, 64, 64, device=device)
    measure([lambda: a @ b], case="product 64x64", peer="ours", flops=2 * 64**3, dtype=torch.float32)


def test_flops_need_a_dtype(measure):
    with pytest.raises(ValueError, match="dtype: got none"):
        measure([lambda: None], case="nothing 1", peer="ours", flops=1)
"""


def test_the_record_holds_times_spread_and_shares(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_bytes((REPOSITORY / "benchmarks" / "conftest.py").read_bytes())
    for name in ("timing.py", "ceilings.py"):
        (tmp_path / name).write_bytes((REPOSITORY / "benchmarks" / name).read_bytes())
    (tmp_path / "test_suite.py").write_text(SUITE, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "--rootdir",
    ]
    result = subprocess.run(
        [*command, ".", "--benchmark-json", "out.json", "."],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    recorded = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    ceilings = recorded["ceilings"]
    copy, product = (bench["extra_info"] for bench in recorded["benchmarks"])

    assert copy["rounds"] >= 15
    assert copy["iqr_ms"] >= 0
    assert copy["gb_s"] == pytest.approx(copy["moved"] / copy["ms"] / 1e6)
    assert copy["percent_of_copy"] == pytest.approx(100 * copy["gb_s"] * 1e9 / ceilings["copy_bytes_s"])
    assert "percent_of_matmul" not in copy

    rate = product["flops"] / product["ms"] * 1e3
    assert product["tflop_s"] == pytest.approx(rate / 1e12)
    assert product["percent_of_matmul"] == pytest.approx(100 * rate / ceilings["matmul_flop_s"]["float32"])
    assert "percent_of_copy" not in product
