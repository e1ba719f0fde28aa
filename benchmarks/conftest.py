"""How the operators and their peers are timed; run ``pytest benchmarks`` (``--smoke`` for tiny sizes, one round).

On CUDA every call is timed over inputs that rotate through more memory than the L2 cache holds, in a CUDA graph, so
that neither a warm cache nor the host's launches are measured; the host's own cost has a benchmark of its own.
Gradients are dense and random. A figure is the median over the rounds. Beside milliseconds stand GB/s of the bytes
that the operation must move (each input read once, each output written once) and the share of the bandwidth that a
device-to-device copy reached in the same run. A peer that cannot run, or computes something else, is skipped with
the reason. On the CPU pytest-benchmark times the calls directly.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import pytest
import torch

Call = Callable[[], Any]
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "inf-cl")
_ROTATED_BYTES = 512 * 2**20  # several times the 50 to 60 MB of L2 of an H100 or H200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="tiny sizes and one round: does the suite itself work?"
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["packages"] = {}
    for package in PACKAGES:
        try:
            machine_info["packages"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine_info["packages"][package] = None
    machine_info["cuda"] = torch.version.cuda
    machine_info["device"] = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine_info["device"] = properties.name
        machine_info["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        machine_info["driver_and_clocks"] = found[0] if found else None


@pytest.fixture(scope="session")
def smoke(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--smoke"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a device-to-device copy of 1 GiB."""
    if device.type == "cpu":
        return float("nan")
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    seconds = device_seconds([lambda: target.copy_(source)])
    return 2 * source.nbytes / seconds


def device_seconds(calls: Sequence[Call], rounds: int = 15) -> float:
    """Median seconds of device time per call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    del kept
    return statistics.median(times)


@pytest.fixture
def rotations(device: torch.device, smoke: bool) -> Callable[[int], int]:
    """How many copies of inputs of so many bytes do not fit into the L2 cache together."""

    def count(bytes_of_one: int) -> int:
        return 1 if smoke or device.type == "cpu" else max(2, min(64, -(-_ROTATED_BYTES // bytes_of_one)))

    return count


@pytest.fixture
def measure(benchmark: Any, device: torch.device, copy_bandwidth: float, smoke: bool) -> Callable[..., None]:
    """Time calls and record ms, GB/s and the share of the copy's bandwidth in the benchmark's ``extra_info``."""

    def run(calls: Sequence[Call], *, moved: int | None = None, case: str, peer: str) -> None:
        benchmark.group = case
        benchmark.extra_info.update(case=case, peer=peer, peak_mib=None)
        if device.type == "cpu":
            if smoke:
                benchmark.pedantic(calls[0], rounds=1)
            else:
                benchmark(calls[0])
            seconds = benchmark.stats.stats.median
        else:
            calls[0]()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[0]()
            torch.cuda.synchronize()
            benchmark.extra_info["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            try:
                seconds = device_seconds(calls, 3 if smoke else 15)
            except RuntimeError as error:  # a call that synchronises cannot be captured
                torch.cuda.synchronize()
                benchmark.extra_info["host_bound"] = str(error).splitlines()[0]
                seconds = event_seconds(calls)
            benchmark.pedantic(lambda: (calls[0](), torch.cuda.synchronize()), rounds=1)
        benchmark.extra_info["ms"] = seconds * 1e3
        if moved is not None:
            benchmark.extra_info["gb_s"] = moved / seconds / 1e9
            if device.type == "cuda":
                benchmark.extra_info["percent_of_copy"] = 100 * moved / seconds / copy_bandwidth

    return run


def event_seconds(calls: Sequence[Call], rounds: int = 15) -> float:
    """Median seconds per call between events, launches included; for what a graph cannot hold."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Print the table: per case every peer, and where ours is not the fastest."""
    plugin = getattr(session.config, "_benchmarksession", None)
    if plugin is None:
        return
    cases: dict[str, list[dict[str, Any]]] = {}
    for bench in plugin.benchmarks:
        if "ms" in bench.extra_info:
            cases.setdefault(bench.extra_info["case"], []).append(bench.extra_info)
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    terminal.write_line("")
    for case, rows in cases.items():
        best = min(rows, key=lambda row: row["ms"])
        lost = " (ours is not the fastest)" if best["peer"] != "ours" and len(rows) > 1 else ""
        terminal.write_line(f"{case}{lost}")
        for row in sorted(rows, key=lambda row: row["ms"]):
            share = f"{row['percent_of_copy']:6.1f} % of copy" if "percent_of_copy" in row else ""
            speed = f"{row['gb_s']:8.1f} GB/s" if "gb_s" in row else ""
            terminal.write_line(f"    {row['peer']:24s} {row['ms']:10.4f} ms {speed} {share}")
