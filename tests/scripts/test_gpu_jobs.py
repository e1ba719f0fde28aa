"""How ``scripts/gpu_check.py`` runs commands, and how each outcome gets to the disk, on machines without a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_jobs_run_side_by_side(gpu_check: ModuleType, tmp_path: Path) -> None:
    import gpu_jobs

    sleep = "import time; print('started', flush=True); time.sleep({})"
    environment = "import os; print(os.environ['GIVEN']); exit(3)"
    jobs = [
        gpu_jobs.Job("one", [sys.executable, "-c", sleep.format(1.5)]),
        gpu_jobs.Job("two", [sys.executable, "-c", sleep.format(1.5)]),
        gpu_jobs.Job("three", [sys.executable, "-c", environment], {"GIVEN": "x"}),
        gpu_jobs.Job("four", [], missing="no such tool"),
        gpu_jobs.Job("five", [sys.executable, "-c", "exit(5)"]),  # pytest: no test was left to run
    ]
    start = time.monotonic()
    outcomes = gpu_jobs.run_together(jobs, start + 60, tmp_path / "log.txt", tmp_path)
    assert {name: outcome.passed for name, outcome in outcomes.items()} == {
        "one": True,
        "two": True,
        "three": False,
        "four": None,
        "five": True,
    }
    assert time.monotonic() - start < outcomes["one"].seconds + outcomes["two"].seconds
    assert outcomes["three"].reason == "exit status 3"
    assert outcomes["four"].reason == "no such tool"
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log.count("started") == 2
    assert "== three: exit status 3" in log


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """As a shell starts a program there: it ignores SIGINT, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow("waits for processes that are to be ended")
@pytest.mark.usefixtures("in_the_background")
def test_a_job_that_runs_over_is_asked_to_stop_and_its_children_end(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    """pytest sums up when it is interrupted; what a job started must not outlive it; all before the deadline."""
    import gpu_jobs

    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    pathlib.Path('asked').touch()\n"
    )
    job = gpu_jobs.Job("slow", [sys.executable, "-c", program])
    deadline = time.monotonic() + gpu_jobs.GRACE + 6
    outcomes = gpu_jobs.run_together([job], deadline, tmp_path / "log.txt", tmp_path)
    assert time.monotonic() < deadline + 1
    assert outcomes["slow"].passed is False
    assert outcomes["slow"].reason == "stopped after 6 s"
    assert (tmp_path / "asked").exists()
    child = int((tmp_path / "child").read_text())
    waited = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < waited, "what the job started goes on"
        time.sleep(0.1)


def test_no_job_starts_when_the_time_is_up(gpu_check: ModuleType, tmp_path: Path) -> None:
    import gpu_jobs

    job = gpu_jobs.Job("late", [sys.executable, "-c", "raise SystemExit(1)"])
    outcomes = gpu_jobs.run_together([job], time.monotonic() + 1, tmp_path / "log.txt", tmp_path)
    assert outcomes["late"].reason == "no time was left"


def test_a_job_that_lost_the_device_begins_anew(gpu_check: ModuleType, tmp_path: Path) -> None:
    """What it did before is written down for it each time; it does not go on for ever."""
    import gpu_jobs

    program = (
        "import pathlib; p = pathlib.Path('n'); n = int(p.read_text()); p.write_text(str(n + 1)); exit({})"
    )
    (tmp_path / "n").write_text("0")
    starts: list[str] = []
    job = gpu_jobs.Job(
        "capture",
        [sys.executable, "-c", program.format("77 if n < 2 else 0")],
        before=lambda: starts.append((tmp_path / "n").read_text()),
    )
    outcomes = gpu_jobs.run_together([job], time.monotonic() + 60, tmp_path / "log.txt", tmp_path)
    assert (outcomes["capture"].passed, outcomes["capture"].restarts) == (True, 2)
    assert starts == ["0", "1", "2"]
    again = gpu_jobs.Job("never", [sys.executable, "-c", "exit(77)"])
    outcomes = gpu_jobs.run_together([again], time.monotonic() + 60, tmp_path / "log.txt", tmp_path)
    assert (outcomes["never"].reason, outcomes["never"].restarts) == (
        "exit status 77",
        gpu_jobs.MOST_RESTARTS,
    )


RECORDED = """
import os
import pytest
import torch
from _pytest.mark.expression import Expression


def test_passes(): pass


def test_fails():
    assert 1 == 2, "numbers"


def test_skipped():
    pytest.skip("no reason")


def test_loses_the_device():
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda: (_ for _ in ()).throw(RuntimeError("an illegal memory access"))
    raise RuntimeError("the kernel")


def test_comes_after(): pass
"""


@pytest.mark.slow("waits for processes that are to be ended")
def test_outcomes_are_on_disk_when_they_are_known(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Also that of a test which lost the device: the process ends there, and another one does the rest."""
    (tmp_path / "test_some.py").write_text(RECORDED, encoding="utf-8")
    rows, done = tmp_path / "tests.jsonl", tmp_path / "done"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_record"]
    command += ["--record", str(rows), "--record-part", "some", "--done", str(done), "--rootdir", ".", "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(REPOSITORY / "scripts")
    for status, ended in ((77, 4), (0, 5)):
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert result.returncode == status, result.stdout + result.stderr
        found = gpu_check.read_rows(rows)
        assert len(found) == ended
        done.write_text("\n".join(row["id"] for row in found), encoding="utf-8")
    said = {row["id"].partition("::")[2]: (row["outcome"], row["message"]) for row in found}
    assert said["test_passes"] == said["test_comes_after"] == ("passed", None)
    assert said["test_fails"][0] == "failed"
    assert "numbers" in said["test_fails"][1]
    assert said["test_skipped"] == ("skipped", "no reason")
    assert said["test_loses_the_device"] == ("failed", "RuntimeError: the kernel")
