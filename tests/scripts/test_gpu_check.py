"""``scripts/gpu_check.sh`` as far as it goes without a GPU: its refusals, its jobs, its limits, what it records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from _pytest.mark.expression import Expression

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"


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
    wheels = 28 * 2**20  # what docs/gpu.md says, rounded up
    assert 2**20 < gpu_wheels.tree_bytes() < gpu_wheels.MOST_BYTES - wheels
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


def test_libraries_that_no_machine_there_loads_are_left_out(gpu_check: ModuleType, tmp_path: Path) -> None:
    import gpu_wheels

    library = "bitsandbytes/libbitsandbytes_{}.so".format
    kept = ["bitsandbytes/__init__.py", *map(library, ("cpu", "cuda126", "cuda128", "cuda130", "cuda132"))]
    dropped = [*map(library, ("cuda118", "cuda121", "cuda124", "rocm714", "xpu2026"))]
    names, record = [*dropped, *kept], "bitsandbytes-1.dist-info/RECORD"
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, name)
        archive.writestr(record, "".join(f"{name},sha256=0,1\n" for name in names) + f"{record},,\n")
    gpu_wheels.leave_out(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == [*kept, record]
        assert [row.split(",")[0] for row in archive.read(record).decode().splitlines()] == [*kept, record]
        assert all(archive.read(name).decode() == name for name in kept)
    before = wheel.stat().st_mtime_ns
    gpu_wheels.leave_out(wheel)  # nothing is left to take out
    assert wheel.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [wheel]


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


@pytest.mark.slow("collects the tests for a GPU")
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


@pytest.mark.slow("collects the tests for a GPU")
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


@pytest.mark.slow("collects the tests for a GPU")
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
    assert record["packages"]["torch"] == metadata.version("torch")
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


IMPORTED = """
import json, sys
from importlib.metadata import packages_distributions
import bitsandbytes, peft, pytest, pytest_benchmark
import shifcon_fast as sf
import shifcon_fast.modeling.estimate_space, shifcon_fast.training.trainer
sf.load_quantized, sf.LanguageSpace, sf.mcl_loss
owners = packages_distributions()
names = {module.partition(".")[0] for module in sys.modules}
print(json.dumps(sorted({owner for name in names for owner in owners.get(name, [])})))
"""


@pytest.mark.slow("imports everything that the device tests and the benchmarks do")
def test_what_is_imported_on_the_device_is_there_or_brought(gpu_check: ModuleType) -> None:
    """A dependency that is new in pyproject.toml is missing there until its wheel is brought."""
    import gpu_wheels

    command = [sys.executable, "-P", "-c", IMPORTED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = {name.lower().replace("_", "-") for name in json.loads(result.stdout.splitlines()[-1])}
    optional = {"datasets", "dill", "multiprocess"}  # which transformers imports where they are
    optional |= {
        "cloudpickle",
        "colorama",
        "pytz",
        "six",
    }  # as pyarrow, torch and pandas (with its own dateutil) do
    of_the_hub = {"httpx2", "httpcore2", "truststore"}  # newer releases of huggingface_hub alone
    assert "pydantic" in found
    assert found - gpu_wheels.EXPECTED - set(gpu_wheels.PACKAGES) <= {"shifcon-fast", *optional, *of_the_hub}
