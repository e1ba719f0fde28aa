"""Run the benchmark suites of this device, within so many minutes; write results/<device>/ (``make bench``).

    python benchmarks/bench.py [--minutes 40] [--suite NAME]... [--out DIR] [--smoke]

A suite is a process of pytest-benchmark, and its record one JSON file. A suite that does not fit into the minutes
that are left is not started, and said; what was there of it before stays. On the CPU operators are timed at the
best level of vector instructions and, held to it, at AVX2, which most machines have (``levels.py``); the ratios
that ``make test-all`` compares with (``ratios.py``) on one thread, by the processor's time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import ceilings
import levels

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Suite:
    """Files of benchmarks that make one record.

    Attributes:
        name: of the record.
        files: of the benchmarks, with pytest's ids where not all of a file.
        minutes: it takes on two cores of a CPU, about; a GPU takes less.
        environment: variables of the process.
        options: for pytest.
        devices: it is for.
    """

    name: str
    files: tuple[str, ...]
    minutes: float
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")


AVX2 = levels.HELD["avx2"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TURNS = ("--turn-seconds", "10")
CHECK = ("--turn-seconds", "3", "--cpu-clock")
SUITES = (
    Suite("operators", ("test_ratios.py",), 2, options=TURNS),
    Suite("operators_avx2", ("test_ratios.py",), 2, AVX2, TURNS, devices=("cpu",)),
    Suite("blocks", ("test_block.py",), 1),
    Suite("step", ("test_step.py",), 6, options=("-k", "not gemma3")),
    Suite("step_gemma3", ("test_step.py",), 8, options=("-k", "gemma3"), devices=("cpu",)),
    Suite("models", ("test_models.py",), 4, options=("--turn-seconds", "90")),
    Suite(
        "models_1_thread",
        ("test_models.py",),
        5,
        ONE_THREAD,
        ("--turn-seconds", "90", "--cpu-clock"),
        ("cpu",),
    ),
    Suite(
        "interventions", ("test_interventions.py",), 5, ONE_THREAD, ("--turn-seconds", "45", "--cpu-clock")
    ),
    Suite("check", ("test_ratios.py",), 1.5, ONE_THREAD, CHECK, devices=("cpu",)),
    Suite("check_avx2", ("test_ratios.py",), 1.5, {**ONE_THREAD, **AVX2}, CHECK, devices=("cpu",)),
)


def device_folder(name: str) -> str:
    """A folder's name for a device: ``NVIDIA H200`` is nvidia-h200, ``Intel(R) Xeon(R) Processor`` intel-xeon."""
    words = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@.*|\d+-core", " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", words)) or "unknown"


def device_name(device: str) -> str:
    """What the device is called; of a CPU, its brand and the level of vector instructions that is used."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    from cpuinfo import get_cpu_info

    return f"{get_cpu_info().get('brand_raw', 'cpu')} {levels.current()}"


def run(suite: Suite, out: Path, seconds: float, smoke: bool) -> str | None:
    """Run one suite; None, or why it gave no record. The record is replaced only by a whole one."""
    made = out / f"{suite.name}.part.json"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rs"]
    command += [
        "-o",
        "addopts=--import-mode=importlib",
        "-o",
        "timeout=0",
        "--benchmark-json",
        str(made),
        *suite.options,
    ]
    command += ["--smoke"] if smoke else []
    environment = {"OMP_WAIT_POLICY": "active", **os.environ, **suite.environment}
    environment.pop(
        "PYTEST_XDIST_WORKER", None
    )  # of a test that runs this: pytest-benchmark would measure nothing
    try:
        result = subprocess.run(
            [*command, *(str(FOLDER / file) for file in suite.files)],
            env=environment,
            timeout=seconds,
            check=False,
        )
        if result.returncode != 0:
            return f"pytest ended with {result.returncode}"
        if not made.is_file():
            return "pytest wrote no record"
        made.replace(out / f"{suite.name}.json")
    except subprocess.TimeoutExpired:
        return f"it was not done within the {seconds / 60:.0f} minutes that were left"
    finally:
        made.unlink(missing_ok=True)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=40.0, help="that all suites may take together")
    parser.add_argument("--suite", action="append", choices=[suite.name for suite in SUITES])
    parser.add_argument("--out", type=Path, help="folder of the records; results/<device> if not given")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round: do the suites work?")
    options = parser.parse_args(arguments)
    device = ceilings.default_device()
    name = device_name(device)
    out = options.out or FOLDER / "results" / device_folder(name)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{name}: records go to {out}")
    until = time.monotonic() + 60 * options.minutes
    failed = 0
    for suite in SUITES:
        if device not in suite.devices or (options.suite and suite.name not in options.suite):
            continue
        left = until - time.monotonic()
        if not options.smoke and left < 60 * suite.minutes:
            problem = f"it takes about {suite.minutes:g} minutes, {left / 60:.1f} are left; raise --minutes"
        else:
            start = time.monotonic()
            problem = run(suite, out, left, options.smoke)
            took = time.monotonic() - start
        if problem is None:
            print(f"{suite.name}: {took / 60:.1f} minutes")
        else:
            failed += 1
            print(f"{suite.name}: NO RECORD: {problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
