"""The roofline plot draws the shares that the measurements say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "roofline.py"
CEILINGS = {
    "device": "a device",
    "copy_bytes_s": 4e12,
    "matmul_flop_s": {"bfloat16": 8e14, "float32": 5e13},
}


def row(case: str, peer: str, ms: float, **work: Any) -> dict[str, Any]:
    return {
        "name": f"test_something.py::test_it[{peer}]",
        "case": case,
        "peer": peer,
        "ms": ms,
        "moved": None,
        "flops": None,
        "dtype": None,
        **work,
    }


BENCHMARKS = [
    row("norm forward 8192x4096", "ours", 0.2, moved=4 * 10**8),  # 2e12 bytes/s
    row("norm forward 8192x4096", "ours, no shift", 0.1, moved=4 * 10**8),
    row("norm forward 8192x4096", "eager", 0.8, moved=4 * 10**8),
    row("norm forward 8192x4096", "Liger", 0.4, moved=4 * 10**8),
    row("norm forward 8192x2048", "ours", 0.1, moved=10**8),
    row("info_nce forward, 1x64x512", "ours", 1.0, flops=2 * 10**11, dtype="bfloat16"),  # 2e14 operations/s
    row("info_nce forward, 1x64x512 float32", "ours", 10.0, flops=10**11, dtype="float32"),
    row("host time, gradients off: info_nce", "ours", 0.01),
    row("pool forward 8x512x4096", "eager", 0.5, moved=10**8),
]


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roofline", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_shares_of_the_right_ceiling_by_size(roofline: ModuleType) -> None:
    found = roofline.curves(BENCHMARKS, CEILINGS)
    assert found.keys() == {
        ("bytes", "norm forward"),
        ("operations", "info_nce forward bfloat16"),
        ("operations", "info_nce forward float32"),
    }
    small, large = found["bytes", "norm forward"]
    assert (small.size, small.peer) == (10**8, None)
    assert small.ours == pytest.approx(25)
    assert large.ours == pytest.approx(50)
    assert (large.peer_name, large.peer) == ("Liger", pytest.approx(25))  # the fastest that computes the same
    assert found["operations", "info_nce forward bfloat16"][0].ours == pytest.approx(25)
    assert found["operations", "info_nce forward float32"][0].ours == pytest.approx(20)


def test_what_is_drawn(roofline: ModuleType) -> None:
    figure = roofline.draw(roofline.curves(BENCHMARKS, CEILINGS), "a device")
    bytes_, operations = figure.axes
    lines = {line.get_label(): line for line in bytes_.get_lines()}
    assert list(lines["norm forward"].get_xdata()) == [10**8, 4 * 10**8]
    assert list(lines["norm forward"].get_ydata()) == pytest.approx([25, 50])
    assert list(lines["norm forward: Liger"].get_ydata()) == pytest.approx([25])
    assert bytes_.get_xscale() == "log"
    assert bytes_.get_ylabel() == "% of copy bandwidth"
    assert {line.get_label() for line in operations.get_lines()} >= {
        "info_nce forward bfloat16",
        "info_nce forward float32",
    }
    assert operations.get_ylabel() == "% of matrix product rate"


def test_without_anything_to_draw_it_says_so(roofline: ModuleType) -> None:
    with pytest.raises(ValueError, match="nothing can be drawn"):
        roofline.curves([row("host time: info_nce", "ours", 0.01)], CEILINGS)


def test_the_command_writes_the_picture(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, BENCHMARKS))
    (tmp_path / "benchmarks.jsonl").write_text(lines + "\n", encoding="utf-8")
    (tmp_path / "ceilings.json").write_text(json.dumps(CEILINGS), encoding="utf-8")
    picture = tmp_path / "new" / "roofline.png"
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--out", str(picture)]
    subprocess.run(command, check=True, timeout=200)
    assert picture.read_bytes().startswith(b"\x89PNG")
