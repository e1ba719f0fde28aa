"""How the operators and their peers are timed; run ``pytest benchmarks`` (``--smoke`` for tiny sizes, one round).

Calls take turns over inputs that together hold more memory than the last-level cache, so that no cache is warm.
On the CPU, memory that was freed stays with the process: otherwise the C library returns it to the system or not as
the order of allocations falls out, and a call that gets fresh pages takes longer.
Gradients are dense and random. On CUDA, device time is taken in a CUDA graph and the host's time stands beside
it; what cannot be captured is timed between events; on the CPU it is the clock's. A figure is the median over as
many rounds as a time budget has room for (at least 15 on the CPU; on CUDA a call that takes long has fewer), with
the distance between the quartiles and the number of rounds. Beside milliseconds stand GB/s of the bytes that the
operation must move (each input read once, each output written once) or TFLOP/s of the products it must form, and
their share of the ceilings (``ceilings.py``) measured in the same run. A peer that cannot run, or computes
something else, is skipped with the reason.

For runs that may be cut off: ``--rows FILE`` appends each figure to FILE (JSON lines) when it is there, and leaves
out what FILE has; ``--goals norm,host`` runs the benchmarks of those groups of ``goals.py`` alone, in its order;
``--warm`` only compiles them. With ``--rows``, a benchmark after which the device may be lost (a capture that
failed) ends the process with exit status 77: call it again, and it goes on, timing that one between events.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import ceilings
import goals
import levels
from timing import (
    BUDGET,
    Call,
    Timing,
    rounds_and_iterations,
    rounds_within,
    time_host,
    time_in_graph,
    time_with_events,
    use_one_stream,
)

from shifcon_fast.version import package_version

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "inf-cl")
LOST = 77  # exit status: the device may be lost to this process, and a new one is to go on
# Several times the 50 to 60 MB of L2 of an H100 or H200, and of what a few cores have of a server's L3.
_ROTATED_BYTES = {"cuda": 512 * 2**20, "cpu": 256 * 2**20}


class Rows:
    """The file of ``--rows``: each figure at once, so that a run which is cut off loses none."""

    def __init__(self, file: str | None) -> None:
        self.file = None if file is None else Path(file)
        self.done: set[str] = set()
        self.uncapturable: dict[str, str] = {}
        if self.file is not None and self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if "ms" in row:
                    self.done.add(row["name"])
                else:
                    self.uncapturable[row["name"]] = row["capture_error"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"name": name, **row}) + "\n")


_ROWS = pytest.StashKey[Rows]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="tiny sizes and one round: does the suite itself work?"
    )
    parser.addoption(
        "--goals", metavar="GROUP,...", help=f"only these, in their order: {', '.join(goals.GROUPS)}"
    )
    parser.addoption(
        "--missed", metavar="DIR", help="only the goals that DIR's record misses, with all peers"
    )
    parser.addoption("--rows", metavar="FILE", help="append each figure to FILE; leave out what it has")
    parser.addoption("--ceilings", metavar="FILE", help="take the ceilings from FILE, do not measure them")
    parser.addoption(
        "--turn-seconds", type=float, default=20.0, help="seconds that peers who take turns may take together"
    )
    parser.addoption(
        "--cpu-clock",
        action="store_true",
        help="peers who take turns are timed by the processor time they take",
    )
    parser.addoption("--warm", action="store_true", help="call once what would be timed, to have it compiled")


def pytest_configure(config: pytest.Config) -> None:
    _keep_freed_memory()
    if torch.cuda.is_available():
        use_one_stream()
    # Backwards are called again and again on one graph, which a compiled one that reuses the memory of what it
    # saved refuses.
    importlib.import_module("torch._functorch.config").donated_buffer = False
    if (file := config.getoption("--ceilings")) is not None and Path(file).exists():
        ceilings.read(Path(file))
    config.stash[_ROWS] = Rows(config.getoption("--rows"))


@pytest.hookimpl(tryfirst=True)  # before -k, which may leave out more
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of all benchmarks those that were asked for, in the order in which they were."""
    wanted: list[str] | None = None
    if (groups := config.getoption("--goals")) is not None:
        if unknown := sorted(set(groups.split(",")) - set(goals.GROUPS)):
            raise pytest.UsageError(
                f"--goals: got {', '.join(unknown)}; wanted some of {', '.join(goals.GROUPS)}"
            )
        wanted = [name for group in groups.split(",") for name in goals.GROUPS[group]]
    if (folder := config.getoption("--missed")) is not None:
        wanted = goals.missed(Path(folder))
    left_out = list(items)
    if wanted is not None:
        by_name = {item.nodeid.rpartition("/")[2]: item for item in items}
        if absent := [name for name in wanted if name not in by_name]:
            raise pytest.UsageError(f"benchmarks/goals.py: there are no benchmarks {', '.join(absent)}")
        items[:] = [by_name[name] for name in wanted]
    rows = config.stash[_ROWS]
    items[:] = [item for item in items if item.nodeid.rpartition("/")[2] not in rows.done]
    config.hook.pytest_deselected(items=[item for item in left_out if item not in items])


def _keep_freed_memory() -> None:
    """Let glibc serve all sizes from memory that it keeps; other C libraries have their own ways, and are left."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the machine's name tells a reader nothing
    machine_info["packages"] = {package: package_version(package) for package in PACKAGES}
    machine_info["cuda"] = torch.version.cuda
    machine_info["device"] = platform.processor() or platform.machine()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["environment"] = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(levels.PREFIXES)
    }
    machine_info["level"] = levels.current()
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
def rotations(device: torch.device, smoke: bool, pytestconfig: pytest.Config) -> Callable[[int], int]:
    """How many copies of inputs of so many bytes do not fit into the last-level cache together."""
    warm = bool(pytestconfig.getoption("--warm"))

    def count(bytes_of_one: int) -> int:
        return 1 if smoke or warm else max(1, min(64, -(-_ROTATED_BYTES[device.type] // bytes_of_one)))

    return count


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(case=…, peer=…, ms=…, …)``: a figure, for the benchmark and the file of ``--rows``."""
    rows, name = request.config.stash[_ROWS], request.node.nodeid.rpartition("/")[2]

    def add(**figures: Any) -> None:
        benchmark.extra_info.update(figures)
        rows.add(name, figures)

    return add


@pytest.fixture
def only_warm(pytestconfig: pytest.Config) -> Callable[[Call], None]:
    """With ``--warm``: make this call, and skip the rest of the test."""

    def call_and_skip(call: Call) -> None:
        if pytestconfig.getoption("--warm"):
            call()
            pytest.skip("compiled, not timed")

    return call_and_skip


@pytest.fixture
def measure(  # noqa: PLR0917 - pytest passes fixtures by name
    benchmark: Any,
    device: torch.device,
    smoke: bool,
    record: Callable[..., None],
    only_warm: Callable[[Call], None],
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """Time calls, and record what came out.

    ``measure(calls, case=…, peer=…, moved=…, flops=…, dtype=…, capturable=True)``: ``moved`` are the bytes that one
    call must read and write, ``flops`` the operations of its matrix products, ``dtype`` what they are formed in;
    ``capturable=False`` says that a call synchronises, or is too large to be held twice. Recorded are ms, iqr_ms,
    rounds, and where they apply gb_s, percent_of_copy, tflop_s, percent_of_matmul, moved, flops, dtype; on CUDA
    host_ms, peak_mib, timed_by ("graph" or "events") and capture_error.
    """
    rows, name = request.config.stash[_ROWS], request.node.nodeid.rpartition("/")[2]

    def run(
        calls: Sequence[Call],
        *,
        case: str,
        peer: str,
        moved: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype | None = None,
        capturable: bool = True,
    ) -> None:
        if flops is not None and dtype is None:
            raise ValueError("dtype: got none; flops are a share of the rate of products in one dtype")
        only_warm(calls[0])
        benchmark.group = case
        info: dict[str, Any] = {"case": case, "peer": peer, "moved": moved, "flops": flops, "peak_mib": None}
        info["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        ceilings.measured(device.type, smoke)  # once a session, before anything else is timed
        if device.type == "cpu":
            timing = _on_cpu(benchmark, calls, smoke)
        else:
            failed = rows.uncapturable.get(name)
            try:
                timing, on_device = _on_cuda(benchmark, calls, smoke, capturable and failed is None)
            except CaptureFailed as error:
                rows.add(name, {"case": case, "peer": peer, "capture_error": str(error)})
                if rows.file is not None:
                    pytest.exit(f"{name}: {error}; the device may be lost to this process", LOST)
                failed = str(error)
                timing, on_device = _on_cuda(benchmark, calls, smoke, False)
            info.update(on_device)
            if failed is not None:
                info["capture_error"] = failed
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
        record(**info)

    return run


@pytest.fixture
def take_turns(
    benchmark: Any,
    smoke: bool,
    device: torch.device,
    record: Callable[..., None],
    pytestconfig: pytest.Config,
) -> Callable[..., None]:
    """Time several peers call by call in turn, so that noise which outlasts a call meets all of them alike.

    ``take_turns({peer: calls, …}, case=…, moved=…, copied=…, several=…, **also)``; one peer is "ours". On CUDA
    a call ends when the device is done. A call is made ``several`` times between two looks at the clock.
    Recorded are, for "ours", ms, rounds, ``times_as_long`` (the median time of every other peer over that of
    ours), ``quartiles`` (of the same ratio, turn by turn) and what is given as ``also``. Where ``moved`` (the
    bytes that ours must move) and ``copied`` (those that the peer "copy" moves) are given, ``percent_of_copy``.
    """
    budget = pytestconfig.getoption("--turn-seconds")
    # What a process waits for others on a full machine is no time of the processor's.
    clock = time.process_time if pytestconfig.getoption("--cpu-clock") else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def run(
        peers: dict[str, Sequence[Call]],
        *,
        case: str,
        moved: int | None = None,
        copied: int | None = None,
        several: int = 1,
        **also: Any,
    ) -> None:
        turns = {peer: itertools.cycle(calls) for peer, calls in peers.items()}
        seconds: dict[str, list[float]] = {peer: [] for peer in peers}

        def turn() -> None:
            for peer, calls in turns.items():
                call = next(calls)
                wait()
                start = clock()
                for _ in range(several):
                    call()
                wait()
                seconds[peer].append((clock() - start) / several)

        turn()  # warms up
        began = time.perf_counter()
        turn()
        once = time.perf_counter() - began
        rounds = 1 if smoke else max(3, min(301, int(budget / once)))
        for _ in range(0 if smoke else min(8, rounds // 5)):
            turn()
        for taken in seconds.values():
            taken.clear()
        for _ in range(rounds):
            turn()
        timings = {peer: Timing.of(taken) for peer, taken in seconds.items()}
        ours = timings.pop("ours")
        figures: dict[str, Any] = {
            "ms": ours.median * 1e3,
            "iqr_ms": ours.iqr * 1e3,
            "rounds": rounds,
            "times_as_long": {peer: timing.median / ours.median for peer, timing in timings.items()},
            "quartiles": {peer: _quartiles(seconds[peer], seconds["ours"]) for peer in timings},
        }
        if moved is not None and copied is not None:
            figures["percent_of_copy"] = 100 * moved / copied * figures["times_as_long"]["copy"]
        benchmark.group = case
        benchmark.pedantic(next(turns["ours"]), rounds=1)
        record(case=case, peer="ours", **figures, **also)

    return run


def _quartiles(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    ratios = [one / other for one, other in zip(theirs, ours, strict=True)]
    lower, _, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return [lower, upper]


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


class CaptureFailed(RuntimeError):
    """A call cannot be captured in a CUDA graph."""


def _on_cuda(
    benchmark: Any, calls: Sequence[Call], smoke: bool, capturable: bool
) -> tuple[Timing, dict[str, Any]]:
    """Device time, and host_ms, peak_mib, timed_by. What takes long is called seldom.

    Raises:
        CaptureFailed: see ``time_in_graph``.
    """
    budget = BUDGET / 100 if smoke else BUDGET
    calls[0]()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    found: dict[str, Any] = {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    found["host_ms"] = time_host(calls, min(15, rounds_within(once, budget / 4))).median * 1e3
    # As many inputs as fit into the budget several times over: of a call that takes long, one.
    calls = calls[: max(1, int(budget / (4 * once)))]
    if capturable:
        try:
            timing = time_in_graph(calls, budget)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureFailed(str(error).splitlines()[0]) from error
    else:
        timing = time_with_events(calls, budget)
    found["timed_by"] = "graph" if capturable else "events"
    benchmark.pedantic(lambda: (calls[0](), torch.cuda.synchronize()), rounds=1)
    return timing, found


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
    events = "" if row.get("timed_by") != "events" else "(between events)"
    speed = f"{row['gb_s']:8.1f} GB/s {row['percent_of_copy']:6.1f} % of copy" if "gb_s" in row else ""
    rate = (
        f"{row['tflop_s']:8.2f} TFLOP/s {row['percent_of_matmul']:6.1f} % of matmul"
        if "tflop_s" in row
        else ""
    )
    others = ", ".join(f"{peer} {times:.2f} x" for peer, times in row.get("times_as_long", {}).items())
    return f"    {row['peer']:24s} {row['ms']:10.4f} ms {spread} {speed} {rate} {others} {events}".rstrip()
