"""The benchmark suite itself works: tiny sizes, one round, on whatever is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow("runs the benchmarks, in small")
def test_smoke(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "--smoke", "-q", "--tb=short", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "--benchmark-json", str(results), str(BENCHMARKS)],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    recorded = json.loads(results.read_text(encoding="utf-8"))
    assert recorded["machine_info"]["packages"]["torch"]
    measured = [bench["extra_info"] for bench in recorded["benchmarks"]]
    cases = {(row["case"].split()[0], row["peer"]) for row in measured}
    assert {(name, "ours") for name in ("norm", "pool", "info_nce", "host")} <= cases
    assert {("norm", "eager"), ("norm", "torch.compile"), ("info_nce", "loop per sentence")} <= cases
    assert all(row["ms"] > 0 for row in measured)
    assert "norm forward 8x64" in result.stdout  # the table with every peer
