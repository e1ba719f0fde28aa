"""``scripts/gpu_check.sh`` as far as it goes without a GPU: its refusals, its jobs, its limits, what it records."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from _pytest.mark.expression import Expression

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    """The script, with its own neighbours on the path, as Python has them where it is called."""
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
        "--only: got ops, tables; wanted some of small, ceilings, contract, captures, models" in result.stderr
    )


def test_a_second_call_wants_the_first_ones_record(tmp_path: Path) -> None:
    result = call(str(tmp_path / "out"), "--call", "2")
    assert result.returncode != 0
    assert "--after: got none; wanted the folder with the first call's records" in result.stderr
    result = call(str(tmp_path / "out"), "--call", "2", "--after", str(tmp_path))
    assert result.returncode != 0
    assert "--after: there is no environment.json in" in result.stderr


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


@pytest.mark.parametrize(("call", "seconds"), [(1, 270), (2, 300)])
def test_the_least_of_every_phase_fits_into_the_call(gpu_check: ModuleType, call: int, seconds: int) -> None:
    """With time to load, and to stop a phase's jobs within it."""
    import gpu_jobs

    plan = gpu_check.CALLS[call]
    assert sum(least for _, least in plan) + 20 <= seconds
    assert all(least > gpu_jobs.GRACE + 10 for _, least in plan)
    assert {part for phase, _ in plan for part in phase} <= set(gpu_check.PARTS)


def made(gpu_check: ModuleType, folder: Path, *arguments: str) -> Any:
    """A run's jobs; ``--after`` is a folder that has a record."""
    if "--after" in arguments:
        (Path(arguments[arguments.index("--after") + 1]) / "environment.json").write_text(
            "{}", encoding="utf-8"
        )
    return gpu_check.Check(folder, folder, gpu_check.parse([str(folder), *arguments]))


def test_what_the_jobs_call_exists(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = made(gpu_check, tmp_path, "--after", str(tmp_path))
    names = []
    for part in gpu_check.PARTS:
        for job in check.jobs(part):
            names.append(job.name)
            paths = [word for word in job.command if word.startswith(str(REPOSITORY))]
            assert paths, job.name
            for path in paths:
                assert Path(path).exists(), path
    assert len(names) == len(set(names)), "outcomes and records are told apart by the jobs' names"


def test_a_second_call_leaves_out_what_the_first_saw_pass(gpu_check: ModuleType, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    first.mkdir()
    out.mkdir()
    rows = [
        {"part": "contract", "id": "tests/a.py::test_passed", "outcome": "passed", "message": None},
        {"part": "contract", "id": "tests/a.py::test_failed", "outcome": "failed", "message": "no"},
        {
            "part": "contract",
            "id": "tests/a.py::test_failed",
            "outcome": "failed",
            "message": "worker crashed",
        },
    ]
    (first / "tests.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    check = made(gpu_check, out, "--after", str(first))
    (job,) = check.jobs("contract")
    assert job.before is not None
    job.before()
    done = Path(job.command[job.command.index("--done") + 1])
    assert done.read_text(encoding="utf-8").split() == ["tests/a.py::test_passed"]
    # What ended in this very call is not begun again after a restart, failed or not.
    row = {"part": "contract", "id": "tests/a.py::test_lost", "outcome": "failed", "message": "lost"}
    (out / "tests.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    job.before()
    assert done.read_text(encoding="utf-8").split() == ["tests/a.py::test_passed", "tests/a.py::test_lost"]
    assert [row["message"] for row in gpu_check.read_rows(first / "tests.jsonl")] == [None, "no"]


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


def test_the_library_is_taken_from_a_wheel_of_these_sources_alone(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_parts
    import gpu_wheels

    root = tmp_path / "root"
    for name in ("shifcon_fast", "kernels", "wheels"):
        (root / name).mkdir(parents=True)
    (root / "shifcon_fast" / "new.py").touch()
    with zipfile.ZipFile(root / "wheels" / "shifcon_fast-1-cp310-abi3-linux_x86_64.whl", "w") as archive:
        archive.writestr("shifcon_fast/_native/cuda.abi3.so", "compiled")
        archive.writestr("shifcon_fast/old.py", "")
    monkeypatch.setattr(gpu_parts, "ROOT", root)
    (root / "wheels" / "csrc.sha256").write_text("of other sources", encoding="utf-8")
    check = made(gpu_check, tmp_path)
    assert check.take_sources() == "the wheel in wheels/ is not of csrc/ as it is"
    (root / "wheels" / "csrc.sha256").write_text(gpu_wheels.digest(), encoding="utf-8")
    assert check.take_sources() is None
    assert (check.site / "shifcon_fast/_native/cuda.abi3.so").read_text(encoding="utf-8") == "compiled"
    assert (check.site / "shifcon_fast/new.py").exists()  # Python comes from the sources, which may be mended
    assert not (check.site / "shifcon_fast/old.py").exists()
    assert made(gpu_check, tmp_path, "--build").take_sources() == "--build was given"


def test_what_is_wrong_with_the_wheels_is_said(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_wheels

    for name, version in {**gpu_wheels.versions(), "shifcon_fast": "0.1"}.items():
        (tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(b"0" * 1000)
    (tmp_path / "csrc.sha256").write_text(gpu_wheels.digest() + "\n", encoding="utf-8")
    assert gpu_wheels.problems(tmp_path) == []
    assert 2**20 < gpu_wheels.tree_bytes() < gpu_wheels.MOST_BYTES
    (tmp_path / "peft-0.1-py3-none-any.whl").touch()
    (tmp_path / "csrc.sha256").write_text("0", encoding="utf-8")
    next(tmp_path.glob("bitsandbytes*")).unlink()
    found = "\n".join(gpu_wheels.problems(tmp_path, tree=64 * 2**20))
    for said in (
        "no wheel of bitsandbytes",
        "several wheels of peft",
        "not built from csrc/",
        "more than 64 MiB",
    ):
        assert said in found


@pytest.fixture(scope="module")
def collected(gpu_check: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """``collected(expression)``: the tests of the contract and of ``tests/gpu`` that pytest's -k would choose."""
    import gpu_parts

    scratch = tmp_path_factory.mktemp("collected")
    (scratch / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    where = ["-c", str(scratch / "pytest.ini"), "--rootdir", str(REPOSITORY)]
    result = subprocess.run(
        [*command, *where, str(gpu_parts.CONTRACT), str(gpu_parts.DEVICE_TESTS)],
        cwd=scratch,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    every = [line for line in result.stdout.splitlines() if "::" in line]

    def choose(expression: str) -> list[str]:
        compiled = Expression.compile(expression)
        return [line for line in every if compiled.evaluate(lambda word, **_: word.lower() in line.lower())]  # noqa: B023

    return choose


def test_every_kernel_is_sanitized(collected: Callable[[str], list[str]]) -> None:
    """The selection is by the names of tests, and a renamed one would drop out of it in silence."""
    import gpu_parts

    chosen = collected(gpu_parts.SANITIZED)
    names = {line.partition("::")[2].partition("[")[0] for line in chosen}
    assert names >= {"test_values_and_gradients", "test_values_and_gradient", "test_loss", "test_similarity"}
    assert any("test_subspace_project.py::test_small" in line for line in chosen)
    assert 30 < len(chosen) < 150  # under the sanitizer, a test takes seconds
    small = collected(gpu_parts.SMALL)
    assert len(small) == 5  # what both calls begin with, and the second one's sanitizer checks
    kernels = gpu_parts.kernel_names()
    assert {"shifcon", "_forward_rows", "_whole_loss", "_product_tile"} <= set(kernels)
    assert "forward" not in kernels  # a launcher


def test_captures_run_one_in_a_process(
    gpu_check: ModuleType, collected: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """Each capture is chosen by one job, and by no other part."""
    import gpu_parts

    by_job = []
    for job in made(gpu_check, tmp_path).jobs("captures"):
        file = next(Path(word).name for word in job.command if word.endswith(".py"))
        keyword = job.command[job.command.index("-k") + 1]
        (chosen,) = [line for line in collected(keyword) if f"/{file}::" in line]
        by_job.append(chosen)
    assert sorted(by_job) == sorted(collected(gpu_parts.CAPTURES))
    assert len(set(by_job)) == 8
    for part in ("contract", "models", "large", "small"):
        (job,) = made(gpu_check, tmp_path).jobs(part)
        assert not set(by_job) & set(collected(job.command[job.command.index("-k") + 1]))


def test_large_tests_are_chosen_by_their_names(collected: Callable[[str], list[str]]) -> None:
    """Run beside others of their kind, they would want more memory than there is."""
    import gpu_parts

    chosen = collected(gpu_parts.LARGE)
    assert (
        len({line.partition("::")[0] for line in chosen}) == 3
    )  # norm in the contract, the others on the device
    for function in (
        (gpu_parts.DEVICE_TESTS / "test_operators.py").read_text(encoding="utf-8").split("\ndef ")[1:]
    ):
        name, _, body = function.partition("(")
        assert gpu_parts.LARGE in name or "    needs(" not in body, name


def test_the_whole_run_records_what_came_out(
    gpu_check: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With stand-ins for the jobs and the device: the environment first, phases in order, one failure said last."""
    import gpu_jobs

    seen: list[str] = []
    out = tmp_path / "out"

    def jobs(self: Any, part: str) -> list[Any]:
        assert json.loads((out / "environment.json").read_text(encoding="utf-8"))["commit"] == "abc"
        seen.append(part)
        code = "raise SystemExit(1)" if part == "step" else "print('fine')"
        if part == "contract":
            row = {
                "part": part,
                "id": "tests/x.py::test_wrong[a b]",
                "outcome": "failed",
                "message": "off\nby 1",
            }
            code = f"open({str(self.tests)!r}, 'a').write({json.dumps(row) + chr(10)!r})"
        return [gpu_jobs.Job(part, [sys.executable, "-c", code], self.environment)]

    monkeypatch.setattr(gpu_check.Check, "jobs", jobs)
    monkeypatch.setattr(
        gpu_check.Check, "install_wheels", lambda self: gpu_jobs.Job("wheels", [], missing="none")
    )
    monkeypatch.setattr(
        gpu_check.Check,
        "build",
        lambda self: gpu_jobs.Job("build", [sys.executable, "-c", "raise SystemExit(1)"]),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    arguments = ["--build", "--only", "contract,step,host", "--commit", "abc"]
    assert gpu_check.main([str(out), *arguments]) == 1
    assert seen == ["contract", "host", "step"]
    record = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    assert record["commit"] == "abc"
    assert record["device"] == "a device"
    assert record["packages"]["torch"] == torch.__version__.partition("+")[0] or record["packages"]["torch"]
    assert record["backends"]["info_nce on cpu"]["chosen"] in (
        "native",
        "reference",
    )  # from the copied sources
    passed = {name: job["passed"] for name, job in record["jobs"].items()}
    assert passed == {"wheels": None, "build": False, "contract": True, "host": True, "step": False}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "tests/x.py::test_wrong[a b]: off"
    assert lines[-2] == "== 1 failing tests"
    assert len(list(out.iterdir())) <= 8


def test_a_call_that_is_ended_from_outside_sums_up(gpu_check: ModuleType, tmp_path: Path) -> None:
    """What ran so far is recorded, and no job outlives the call."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gpu_check, gpu_jobs\n"
        "sleep = [sys.executable, '-c', 'import time; open(\"started\", \"w\"); time.sleep(600)']\n"
        "gpu_check.Check.jobs = lambda self, part: [gpu_jobs.Job(part, sleep)]\n"
        "gpu_check.Check.install_wheels = lambda self: gpu_jobs.Job('wheels', [], missing='none')\n"
        "gpu_check.Check.take_sources = lambda self: None\n"
        "gpu_check.describe_loaded = lambda check: {}\n"
        "sys.exit(gpu_check.main(['out', '--only', 'small', '--commit', 'abc', '--seconds', '90']))\n"
    )
    environment = {**os.environ, "SHIFCON_REHEARSE": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(SCRIPT.parent)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 80
    while not list(tmp_path.glob("*/started")):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "== 0 failing tests" in printed
    assert json.loads((tmp_path / "out/environment.json").read_text(encoding="utf-8"))["commit"] == "abc"
    assert "== small: interrupted" in (tmp_path / "out/log.txt").read_text(encoding="utf-8")
