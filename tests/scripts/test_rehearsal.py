"""What runs on a device runs on the CPU as far as it can: a first run on a device then tests the device.

The tests of ``tests/gpu``; and parts of both calls of ``scripts/gpu_check.sh``, on a stub of the device. All parts
of a call take minutes: ``SHIFCON_REHEARSE=1 scripts/gpu_check.sh OUT --call 1`` does them (docs/gpu.md).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
GPU_TESTS = REPOSITORY / "tests" / "gpu"


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


def rehearse(out: Path, *options: str, seconds: int = 400) -> dict[str, Any]:
    """One call; what environment.json says of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"SHIFCON_REHEARSE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = [str(REPOSITORY / "scripts" / "gpu_check.sh"), str(out), "--seconds", str(seconds)]
    result = subprocess.run(
        [*command, "--commit", "abc", *options],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert len(result.stdout) < 12_000  # what a reader sees of a call
    assert result.stdout.rstrip().endswith("== 0 failing tests")
    assert len([file for file in out.rglob("*") if file.is_file()]) <= 8
    assert all(file.parent == out for file in out.rglob("*"))
    record: dict[str, Any] = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    assert record["seconds"] < seconds
    assert record["commit"] == "abc"
    return record


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.timeout(900)
@pytest.mark.slow("runs both calls of gpu_check on a stub of a device, in small")
def test_both_calls(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    record = rehearse(first, "--call", "1", "--only", "small,ceilings,projection")
    assert list(record["jobs"]) == ["wheels", "small", "ceilings", "projection"]
    assert all(job["passed"] for name, job in record["jobs"].items() if name != "wheels")
    assert record["backends"]["subspace_project on cpu"]
    ceilings = json.loads((first / "ceilings.json").read_text(encoding="utf-8"))
    assert ceilings["device"] == "a stub of a device"
    found = {row["name"]: row for row in rows(first / "benchmarks.jsonl") if "ms" in row}
    ours, eager = (found[f"test_projection.py::test_forward[64-{peer}]"] for peer in ("ours", "eager"))
    # The reference backend reads ids back, as eager does; a compiled one does not.
    native = record["backends"]["subspace_project on cpu"]["chosen"] == "native"
    assert (ours["timed_by"], eager["timed_by"]) == ("graph" if native else "events", "events")
    assert ours["percent_of_copy"] == pytest.approx(100e9 * ours["gb_s"] / ceilings["copy_bytes_s"])
    outcomes = {
        (row["part"], row["id"].partition("::")[2]): row["outcome"] for row in rows(first / "tests.jsonl")
    }
    assert outcomes["small", "test_one_small_call[norm]"] == "passed"
    assert outcomes["projection", "test_forward[64-torch.compile]"] == "passed"

    record = rehearse(second, "--call", "2", "--only", "step,memcheck", "--after", str(first))
    step = json.loads((second / "step.json").read_text(encoding="utf-8"))
    assert list(step["variants"]) == ["plain QLoRA", "authors' recipe", "ours"]
    assert all(row["steps"] == 2 and row["kernels"] for row in step["variants"].values())
    assert record["jobs"]["memcheck"]["reason"] == "compute-sanitizer is not installed"
