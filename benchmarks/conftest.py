"""How the operators and their peers are timed; run ``pytest benchmarks`` (``--smoke`` for tiny sizes, one round).

Calls take turns over inputs that together hold more memory than the last-level cache, so that no cache is warm.
On the CPU, memory that was freed stays with the process: otherwise the C library returns it to the system or not as
the order of allocations falls out, and a call that gets fresh pages takes longer.
Gradients are dense and random. On CUDA, device time is taken in a CUDA graph and the host's time stands beside
it; on the CPU it is the clock's. A figure is the median over at least 15 rounds after a warm-up, with the distance
between the quartiles. Beside milliseconds stand GB/s of the bytes that the operation must move (each input read
once, each output written once) or TFLOP/s of the products it must form, and their share of the ceilings
(``ceilings.py``) measured in the same run. A peer that cannot run, or computes something else, is skipped with the
reason.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import ceilings
from timing import (
    Call,
    Timing,
    rounds_and_iterations,
    time_host,
    time_in_graph,
    time_with_events,
)

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "inf-cl")
# Several times the 50 to 60 MB of L2 of an H100 or H200, and of what a few cores have of a server's L3.
_ROTATED_BYTES = {"cuda": 512 * 2**20, "cpu": 256 * 2**20}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="tiny sizes and one round: does the suite itself work?"
    )


def pytest_configure(config: pytest.Config) -> None:
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc serve all sizes from memory that it keeps; other C libraries have their own ways, and are left."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the machine's name tells a reader nothing
    machine_info["packages"] = {}
    for package in PACKAGES:
        try:
            machine_info["packages"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine_info["packages"][package] = None
    machine_info["cuda"] = torch.version.cuda
    machine_info["device"] = platform.processor() or platform.machine()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["environment"] = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "SHIFCON_"))
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine_info["device"] = properties.name
        machine_info["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        machine_info["driver_and_clocks"] = found[0] if found else None


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """The ceilings of this very session go into its record; they are measured but once."""
    output_json["ceilings"] = ceilings.measured(ceilings.default_device(), bool(config.getoption("--smoke")))


@pytest.fixture(scope="session")
def smoke(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--smoke"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(ceilings.default_device())


@pytest.fixture
def rotations(device: torch.device, smoke: bool) -> Callable[[int], int]:
    """How many copies of inputs of so many bytes do not fit into the last-level cache together."""

    def count(bytes_of_one: int) -> int:
        return 1 if smoke else max(2, min(64, -(-_ROTATED_BYTES[device.type] // bytes_of_one)))

    return count


@pytest.fixture
def measure(benchmark: Any, device: torch.device, smoke: bool) -> Callable[..., None]:
    """Time calls, and record what came out in the benchmark's ``extra_info``.

    ``measure(calls, case=…, peer=…, moved=…, flops=…, dtype=…)``: ``moved`` are the bytes that one call must read
    and write, ``flops`` the operations of its matrix products, ``dtype`` what they are formed in. Recorded are ms,
    iqr_ms, rounds, and where they apply gb_s, percent_of_copy, tflop_s, percent_of_matmul, host_ms and peak_mib
    (CUDA), moved, flops, dtype.
    """

    def run(
        calls: Sequence[Call],
        *,
        case: str,
        peer: str,
        moved: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        benchmark.group = case
        info = benchmark.extra_info
        info.update(case=case, peer=peer, moved=moved, flops=flops, peak_mib=None)
        info["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        if flops is not None and dtype is None:
            raise ValueError("dtype: got none; flops are a share of the rate of products in one dtype")
        ceilings.measured(device.type, smoke)  # once a session, before anything else is timed
        timing = (
            _on_cpu(benchmark, calls, smoke) if device.type == "cpu" else _on_cuda(benchmark, calls, smoke)
        )
        info.update(ms=timing.median * 1e3, iqr_ms=timing.iqr * 1e3, rounds=timing.rounds)
        if moved is not None:
            info["gb_s"] = moved / timing.median / 1e9
            info["percent_of_copy"] = (
                100 * moved / timing.median / ceilings.copy_bandwidth(device.type, smoke)
            )
        if flops is not None:
            info["tflop_s"] = flops / timing.median / 1e12
            rate = ceilings.matmul_rate(device.type, info["dtype"], smoke)
            info["percent_of_matmul"] = 100 * flops / timing.median / rate

    return run


@pytest.fixture
def take_turns(benchmark: Any, smoke: bool) -> Callable[..., None]:
    """Time several peers call by call in turn, so that noise which outlasts a call meets all of them alike.

    ``take_turns({peer: calls, …}, case=…)``; one peer is "ours". CPU only. Recorded are, for "ours", ms, rounds and
    ``times_as_long``: the median time of every other peer over that of ours.
    """

    def run(peers: dict[str, Sequence[Call]], *, case: str) -> None:
        turns = {peer: itertools.cycle(calls) for peer, calls in peers.items()}
        rounds, warmup = (1, 0) if smoke else (301, 10)
        seconds: dict[str, list[float]] = {peer: [] for peer in peers}
        for count in range(warmup + rounds):
            for peer, calls in turns.items():
                call = next(calls)
                start = time.perf_counter()
                call()
                if count >= warmup:
                    seconds[peer].append(time.perf_counter() - start)
        timings = {peer: Timing.of(taken) for peer, taken in seconds.items()}
        ours = timings.pop("ours")
        benchmark.group = case
        benchmark.pedantic(next(turns["ours"]), rounds=1)
        benchmark.extra_info.update(
            case=case,
            peer="ours",
            ms=ours.median * 1e3,
            iqr_ms=ours.iqr * 1e3,
            rounds=rounds,
            times_as_long={peer: timing.median / ours.median for peer, timing in timings.items()},
        )

    return run


def _on_cpu(benchmark: Any, calls: Sequence[Call], smoke: bool) -> Timing:
    if smoke:
        benchmark.pedantic(calls[0], rounds=1)
    else:
        turns = itertools.cycle(calls)
        rounds, iterations = rounds_and_iterations(time_host(calls, 3).median)

        def one() -> Any:
            return next(turns)()

        benchmark.pedantic(one, rounds=rounds, iterations=iterations, warmup_rounds=3)
    stats = benchmark.stats.stats
    return Timing(stats.median, stats.iqr, stats.rounds)


def _on_cuda(benchmark: Any, calls: Sequence[Call], smoke: bool) -> Timing:
    calls[0]()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls[0]()
    torch.cuda.synchronize()
    benchmark.extra_info["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    rounds = 3 if smoke else 15
    benchmark.extra_info["host_ms"] = time_host(calls, rounds).median * 1e3
    try:
        timing = time_in_graph(calls, rounds)
    except RuntimeError as error:  # a call that synchronises cannot be captured
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        torch.cuda.synchronize()
        benchmark.extra_info["host_bound"] = str(error).splitlines()[0]
        timing = time_with_events(calls, rounds)
    benchmark.pedantic(lambda: (calls[0](), torch.cuda.synchronize()), rounds=1)
    return timing


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
            terminal.write_line(_line(row))


def _line(row: dict[str, Any]) -> str:
    spread = f"± {row['iqr_ms'] / 2:8.4f}" if "iqr_ms" in row else ""
    speed = f"{row['gb_s']:8.1f} GB/s {row['percent_of_copy']:6.1f} % of copy" if "gb_s" in row else ""
    rate = (
        f"{row['tflop_s']:8.2f} TFLOP/s {row['percent_of_matmul']:6.1f} % of matmul"
        if "tflop_s" in row
        else ""
    )
    others = ", ".join(f"{peer} {times:.2f} x" for peer, times in row.get("times_as_long", {}).items())
    return f"    {row['peer']:24s} {row['ms']:10.4f} ms {spread} {speed} {rate} {others}".rstrip()
