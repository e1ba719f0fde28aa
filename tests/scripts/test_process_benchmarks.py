"""The benchmarks of gradient caching, two processes and growing work run, and compare the same computation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow("each starts several processes, which import everything")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("gradient_cache", ["--times", "2", "--rounds", "1"]),
        ("processes", ["--steps", "1", "--rounds", "1", "--cores", "1"]),
    ],
)
def test_it_runs_on_a_tiny_model(name: str, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(BENCHMARKS / f"{name}.py"), "--size", "tiny", "--out", str(tmp_path)]
    subprocess.run([*command, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["machine"]["versions"]["torch"]
    if name == "processes":
        one, two = record["one process"][0], record["two processes"][0]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
    else:
        (one,), (cached,) = (record["sizes"]["tiny"][name] for name in ("one pass", "cached"))
        assert one["mini_batch_size"] == cached["mini_batch_size"] == one["pairs"]
        assert cached["pairs"] == 2 * one["pairs"]
        assert cached["loss"] > one["loss"]  # more negatives


@pytest.mark.slow("builds a model and takes dozens of steps")
def test_growing_work_becomes_a_table_and_a_plot(tmp_path: Path) -> None:
    file, picture = tmp_path / "growth" / "tiny.json", tmp_path / "growth.png"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], check=True, env=environment, capture_output=True, text=True
        )
        return done.stdout

    run(str(BENCHMARKS / "step" / "growth.py"), "--size", "tiny", "--steps", "1", "--out", str(file))
    run(str(BENCHMARKS / "growth_plot.py"), str(file), "--out", str(picture))
    table = (
        f"from pathlib import Path; import tables; print(tables.TABLES['growth'](Path({str(tmp_path)!r})))"
    )
    said = run("-c", table)
    for curve in json.loads(file.read_text())["curves"]:
        assert f"| tiny | {curve} |" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
