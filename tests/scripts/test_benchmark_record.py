"""What a benchmark leaves in its record: time with its spread, and shares of ceilings measured in the same run.

On a stub of a CUDA device (tests/scripts/stub): what is captured in a graph, and what comes after a failed capture.
"""

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


def call(suite: str, folder: Path, *options: str, stub: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a suite of benchmarks beside the real conftest."""
    for name in ("conftest.py", "timing.py", "ceilings.py", "goals.py", "levels.py"):
        (folder / name).write_bytes((REPOSITORY / "benchmarks" / name).read_bytes())
    (folder / "test_suite.py").write_text(suite, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "--rootdir",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if stub:
        environment["PYTHONPATH"] = str(REPOSITORY / "tests/scripts/stub")
    return subprocess.run(
        [*command, ".", *options, "."],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.slow("runs a benchmark")
def test_the_record_holds_times_spread_and_shares(tmp_path: Path) -> None:
    result = call(SUITE, tmp_path, "--benchmark-json", "out.json")
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


ON_A_DEVICE = """
import torch


def backward(size):
    leaf = torch.randn(size, size, device="cuda").requires_grad_()
    outputs = leaf.sin()
    return lambda: torch.autograd.grad(outputs, leaf, torch.ones_like(leaf), retain_graph=True)


def test_backward(measure):
    calls = [backward(8) for _ in range(3)]
    measure(calls, case="backward 8x8", peer="ours", moved=100)


def test_marked(measure, device):
    x = torch.randn(8, device=device)
    measure([lambda: x.sum().item()], case="read 8", peer="eager", capturable=False)


def test_unmarked(measure, device):
    x = torch.randn(8, device=device)
    measure([lambda: x.sum().tolist()], case="read 8", peer="other")


def test_after_it(measure, device):
    x = torch.randn(8, device=device)
    measure([lambda: x + 1], case="add 8", peer="ours")
"""


def rows(file: Path) -> dict[str, dict[str, object]]:
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {row["name"].partition("::")[2]: row for row in lines}


@pytest.mark.slow("runs a suite of benchmarks twice, on a stub of a device")
def test_a_failed_capture_ends_the_process_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """The figures before it are on disk; it is timed between events; nothing is timed twice."""
    arguments = ("--smoke", "--rows", "rows.jsonl")
    first = call(ON_A_DEVICE, tmp_path, *arguments, stub=True)
    assert first.returncode == 77, first.stdout + first.stderr
    early = rows(tmp_path / "rows.jsonl")
    assert early.keys() == {"test_backward", "test_marked", "test_unmarked"}
    assert "not permitted when stream is capturing" in str(early["test_unmarked"]["capture_error"])
    assert "ms" not in early["test_unmarked"]
    second = call(ON_A_DEVICE, tmp_path, *arguments, stub=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 deselected" in second.stdout
    found = rows(tmp_path / "rows.jsonl")
    by = {name: row["timed_by"] for name, row in found.items()}
    assert by == {
        "test_backward": "graph",
        "test_marked": "events",
        "test_unmarked": "events",
        "test_after_it": "graph",
    }
    assert found["test_unmarked"]["capture_error"] == early["test_unmarked"]["capture_error"]
    assert found["test_backward"] == early["test_backward"]


TIMING = """
import sys
sys.path.insert(0, "benchmarks")
import torch
from timing import time_in_graph, use_one_stream, rounds_within

def backward():
    leaf = torch.randn(8, device="cuda").requires_grad_()
    outputs = leaf.sin()
    return lambda: torch.autograd.grad(outputs, leaf, torch.ones_like(leaf), retain_graph=True)

call = backward()
try:
    time_in_graph([call])
except RuntimeError as error:
    assert "use_one_stream() first" in str(error), error
else:
    raise AssertionError("captured on the default stream")
use_one_stream()
stream = torch.cuda.current_stream()
assert stream != torch.cuda.default_stream()
use_one_stream()
assert torch.cuda.current_stream() == stream
assert time_in_graph([backward() for _ in range(3)], budget=0.01).rounds >= 1
try:
    time_in_graph([call])
except RuntimeError as error:
    assert "legacy stream" in str(error), error
else:
    raise AssertionError("the forward's stream was the default one, and that did not matter")
assert rounds_within(10.0, 1.0) == 1 and rounds_within(0.1, 1.0) == 10 and rounds_within(0.0, 1.0) == 101
print("fine")
"""


def test_forward_warm_up_and_capture_share_one_stream() -> None:
    """As autograd has it: a backward runs on its forward's stream, and a capture cannot meet the default one."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests/scripts/stub")}
    command = [sys.executable, "-P", "-c", TIMING]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.stdout.strip() == "fine", result.stdout + result.stderr


@pytest.mark.slow("collects every benchmark")
def test_goals_name_benchmarks_that_there_are_and_are_read_from_the_rows(tmp_path: Path) -> None:
    """All groups together are collected (a renamed benchmark would be a usage error), in their order."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir"]
    groups = "host,norm,info_nce,projection,info_nce_65536"
    result = subprocess.run(
        [*command, str(REPOSITORY), str(REPOSITORY / "benchmarks"), "-o", "addopts=", "--goals", groups],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    names = [line.rpartition("/")[2] for line in result.stdout.splitlines() if "::" in line]
    assert names[0].startswith("test_host.py::test_host_time[add_shift_rms_norm-False]")
    norm = [name for name in names if name.startswith("test_norm.py")]
    ours = [index for index, name in enumerate(norm) if "-ours" in name]
    assert ours == list(range(len(ours))), "ours comes first"
    assert "-4096-" in norm[len(ours)]


def test_what_the_goals_say_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import goals

    assert goals.table(tmp_path).count("not measured") == len(goals.goals())

    def write(*figures: dict[str, object]) -> None:
        (tmp_path / "benchmarks.jsonl").write_text("\n".join(map(json.dumps, figures)), encoding="utf-8")

    share = [{"name": goals.forward(d, "ours"), "ms": 1.01, "percent_of_copy": 91.0} for d in goals.HIDDEN]
    plain = [{"name": goals.forward(d, "ours, no shift"), "ms": 1.0} for d in goals.HIDDEN]
    memory = [
        {"name": goals.loss(goals.LARGE, peer), "ms": ms, "peak_mib": mib}
        for peer, ms, mib in (("ours", 2.0, 5.0), ("eager", 2.5, 100.0))
    ]
    write(*share, *plain, *memory, {"name": goals.host("info_nce", True), "capture_error": "no figure"})
    step = {"plain QLoRA": {"ms": 10.0, "flops": 4.0}, "authors' recipe": {"ms": 30.0, "flops": 9.0}}
    step["ours"] = {"ms": 13.0, "flops": 5.0}
    (tmp_path / "step.json").write_text(json.dumps({"variants": step}), encoding="utf-8")
    said = {line[:48].strip(): line[48:].split() for line in goals.table(tmp_path).splitlines()}
    assert said["norm forward, d 2,048 ... 8,192"] == ["≥", "90", "91.00", "%", "of", "copy", "held"]
    assert said["the shift's cost"][2:] == ["1.00", "%", "of", "the", "forward", "held"]
    assert said["info_nce 1x65536x1024-bfloat16, eager"][2:] == ["1.25", "x", "MISSED"]
    assert said["info_nce 1x65536x1024-bfloat16, memory"][2:] == ["5.00", "%", "of", "eager's", "MISSED"]
    assert said["a step: the authors' recipe, ours"][2:] == ["2.31", "x", "held"]
    assert said["a step: ours, plain QLoRA's FLOP bound"][2:] == ["1.04", "x", "held"]
    assert said["host time of a call"][2:] == ["not", "measured"]
    write({**share[0], "percent_of_copy": 80.0}, *share[1:], *plain)
    missed = goals.missed(tmp_path)
    assert missed[0] == goals.forward(2048, "ours")
    assert missed.index(goals.forward(4096, "Liger")) < missed.index(goals.backward(2048, "frozen", "ours"))
    assert not any("65536" in name or "no shift" in name for name in missed)
