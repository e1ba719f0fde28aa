"""``scripts/gpu_check.sh`` as far as it goes without a GPU: its refusals, its jobs, its limits, what it records."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_without_a_device_it_refuses_and_writes_nothing(tmp_path: Path) -> None:
    result = call(str(tmp_path / "out"))
    assert result.returncode == 2
    assert "no PyTorch that sees a CUDA device" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_named_beside_the_known_ones(tmp_path: Path) -> None:
    result = call(str(tmp_path / "out"), "--only", "ops,tables")
    assert result.returncode != 0
    assert (
        "got tables; wanted some of build, ceilings, ops, models, sanitizer, step, benchmarks"
        in result.stderr
    )


def test_jobs_run_side_by_side_within_their_limits(gpu_check: ModuleType, tmp_path: Path) -> None:
    sleep = "import time; print('started', flush=True); time.sleep({})"
    jobs = [
        gpu_check.Job("one", 60, [sys.executable, "-c", sleep.format(1.5)]),
        gpu_check.Job("two", 60, [sys.executable, "-c", sleep.format(1.5)]),
        gpu_check.Job(
            "three",
            60,
            [sys.executable, "-c", "import os; print(os.environ['GIVEN']); exit(3)"],
            {"GIVEN": "x"},
        ),
        gpu_check.Job("four", 60, [], missing="no such tool"),
    ]
    start = time.monotonic()
    outcomes = gpu_check.run_together(jobs, start + 60, tmp_path / "log.txt", tmp_path)
    assert {name: outcome.passed for name, outcome in outcomes.items()} == {
        "one": True,
        "two": True,
        "three": False,
        "four": None,
    }
    assert time.monotonic() - start < outcomes["one"].seconds + outcomes["two"].seconds
    assert outcomes["three"].reason == "exit status 3"
    assert outcomes["four"].reason == "no such tool"
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log.count("started") == 2
    assert "== three: exit status 3" in log


def test_a_job_that_runs_over_is_asked_to_stop_and_its_children_end(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    """pytest writes its files when it is interrupted; what a job started must not outlive it."""
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    pathlib.Path('asked').touch()\n"
    )
    job = gpu_check.Job("slow", 60, [sys.executable, "-c", program])
    outcomes = gpu_check.run_together([job], time.monotonic() + 6, tmp_path / "log.txt", tmp_path)
    assert outcomes["slow"].passed is False
    assert outcomes["slow"].reason == "stopped after 6 s"
    assert (tmp_path / "asked").exists()
    child = int((tmp_path / "child").read_text())
    waited = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < waited, "what the job started goes on"
        time.sleep(0.1)


def test_no_job_starts_when_the_time_is_up(gpu_check: ModuleType, tmp_path: Path) -> None:
    job = gpu_check.Job("late", 60, [sys.executable, "-c", "raise SystemExit(1)"])
    outcomes = gpu_check.run_together([job], time.monotonic() + 1, tmp_path / "log.txt", tmp_path)
    assert outcomes["late"].reason == "no time was left"


def test_limits_fit_into_the_total(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Jobs of a phase run side by side; the benchmarks, last, get what the others leave."""
    check = gpu_check.Check(tmp_path, tmp_path)
    needed = check.install_wheels().seconds + check.build().seconds
    for phase in gpu_check.PHASES[:-1]:
        needed += max((job.seconds for part in phase for job in check.jobs(part)), default=0)
    assert needed <= gpu_check.TOTAL_SECONDS + 30
    assert gpu_check.TOTAL_SECONDS < 540
    assert [part for phase in gpu_check.PHASES for part in phase] == list(gpu_check.PARTS[1:])


def test_what_the_jobs_call_exists(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, tmp_path)
    for part in gpu_check.PARTS[1:]:
        for job in check.jobs(part):
            paths = [word for word in job.command if word.startswith(str(REPOSITORY))]
            assert paths, job.name
            for path in paths:
                assert Path(path).exists(), path


def collected(selection: str, folders: list[Path], scratch: Path) -> list[str]:
    """Names of the tests that ``-k selection`` chooses."""
    (scratch / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    where = ["-c", str(scratch / "pytest.ini"), "--rootdir", str(REPOSITORY), *map(str, folders)]
    result = subprocess.run(
        [*command, *where, "-k", selection],
        cwd=scratch,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if "::" in line]


def test_every_kernel_is_sanitized(gpu_check: ModuleType, tmp_path: Path) -> None:
    """The selection is by the names of tests, and a renamed one would drop out of it in silence."""
    chosen = collected(gpu_check.SANITIZED, [gpu_check.CONTRACT, gpu_check.DEVICE_TESTS], tmp_path)
    names = {line.partition("::")[2].partition("[")[0] for line in chosen}
    assert names >= {"test_values_and_gradients", "test_values_and_gradient", "test_loss", "test_similarity"}
    assert any("test_subspace_project.py::test_small" in line for line in chosen)
    assert 30 < len(chosen) < 150  # under the sanitizer, a test takes seconds


def test_large_tests_are_chosen_by_their_names(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Run beside others, they would want more memory than there is."""
    chosen = collected(gpu_check.LARGE, [gpu_check.CONTRACT, gpu_check.DEVICE_TESTS], tmp_path)
    assert (
        len({line.partition("::")[0] for line in chosen}) == 3
    )  # norm in the contract, the others on the device
    for function in (
        (gpu_check.DEVICE_TESTS / "test_operators.py").read_text(encoding="utf-8").split("\ndef ")[1:]
    ):
        name, _, body = function.partition("(")
        assert gpu_check.LARGE in name or "    needs(" not in body, name


def test_the_whole_run_records_what_came_out(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the jobs and the device: phases in order, one failure, the environment."""
    seen: list[str] = []

    def jobs(self: Any, part: str) -> list[Any]:
        seen.append(part)
        code = "raise SystemExit(1)" if part == "step" else "print('fine')"
        return [gpu_check.Job(part, 60, [sys.executable, "-c", code], self.environment)]

    monkeypatch.setattr(gpu_check.Check, "jobs", jobs)
    monkeypatch.setattr(
        gpu_check.Check,
        "build",
        lambda self: gpu_check.Job("build", 60, [sys.executable, "-c", "raise SystemExit(1)"]),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    out = tmp_path / "out"
    assert gpu_check.main([str(out), "--only", "ops,step,benchmarks", "--commit", "abc"]) == 1
    assert seen == ["ops", "step", "benchmarks"]
    record = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    assert record["commit"] == "abc"
    assert record["device"] == "a device"
    assert record["packages"]["torch"] == torch.__version__.partition("+")[0] or record["packages"]["torch"]
    assert record["backends"]["info_nce on cpu"]["chosen"] in (
        "native",
        "reference",
    )  # from the copied sources
    passed = {name: job["passed"] for name, job in record["jobs"].items()}
    assert passed == {"wheels": None, "build": False, "ops": True, "step": False, "benchmarks": True}
