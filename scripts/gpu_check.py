"""Everything that needs a CUDA machine, in at most nine minutes, from a bare checkout with torch, Triton and nvcc.

    scripts/gpu_check.sh OUT [--only PART,PART...] [--commit ID]

Parts, in the order in which they run (``build`` always does; correctness runs side by side, what is timed alone):

* build: the package with its CPU and CUDA libraries, into a temporary folder
* ceilings: the copy's bandwidth and the matrix product's rate, before anything else is timed
* ops: the operators' contract on the device, and ``tests/gpu`` but for the models
* models: attached models, ``torch.compile``, CUDA graphs, NF4 training
* sanitizer: compute-sanitizer's memcheck and racecheck on small shapes
* step: one real training step of a random Llama-3-8B in NF4 against the authors' recipe
* benchmarks: the operators beside their peers

Nothing is fetched. Packages that the machine lacks can be brought as wheels in ``wheels/`` beside this folder: they
are installed for this run only. OUT gets environment.json (device, driver, versions, commit, backends, and for each
job what came out and how long it took), ceilings.json, ops.xml, ops_large.xml, models.xml, step.json,
benchmarks.json and log.txt: eight files. Exit status 0 if every job passed or could not apply, 1 if one failed, 2
without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTRACT, DEVICE_TESTS = ROOT / "tests" / "contract", ROOT / "tests" / "gpu"
TOTAL_SECONDS = 530
PHASES = (("ceilings",), ("ops", "models", "sanitizer"), ("step",), ("benchmarks",))
PARTS = ("build", *(part for phase in PHASES for part in phase))
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "pytest"),
    *("liger-kernel", "quack-kernels", "inf-cl"),
)
# Small shapes of every kernel; the names are those of the contract's and of tests/gpu's tests.
SANITIZED = (
    "(test_values_and_gradients and 7-) or (test_values_and_gradient and shape1) or index_per_row or small"
    " or (test_loss and (shape2 or shape4)) or (test_similarity and shape0)"
)
LARGE = "two_to_the_31"  # tests that take tens of GiB each
_GRACE = 20  # seconds between the request to stop, upon which pytest still writes its files, and the end


@dataclass(frozen=True)
class Job:
    """One command with a limit of its own; ``missing`` says why it cannot apply here."""

    name: str
    seconds: int
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


@dataclass
class Outcome:
    """``passed`` is None where a job could not apply."""

    passed: bool | None
    seconds: float
    reason: str | None = None


def run_together(jobs: Sequence[Job], deadline: float, log: Path, cwd: Path) -> dict[str, Outcome]:
    """Run jobs side by side, each within its own limit and what is left until ``deadline`` (monotonic seconds).

    A job's output is appended to ``log`` when it ends. A job that runs over is interrupted, then killed with
    whatever it started.
    """
    outcomes: dict[str, Outcome] = {}
    running: dict[str, tuple[subprocess.Popen[bytes], float, float, Any]] = {}
    for job in jobs:
        start = time.monotonic()
        limit = min(job.seconds, deadline - start)
        if job.missing is not None:
            outcomes[job.name] = Outcome(None, 0.0, job.missing)
        elif limit < 5:
            outcomes[job.name] = Outcome(False, 0.0, "no time was left")
        else:
            print(f"== {job.name} (at most {limit:.0f} s)", flush=True)
            output = tempfile.TemporaryFile()  # noqa: SIM115 - closed where it is read
            process = subprocess.Popen(
                job.command,
                cwd=cwd,
                env={**os.environ, **job.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            running[job.name] = (process, start, limit, output)
    while running:
        time.sleep(0.05)
        for name, (process, start, limit, output) in list(running.items()):
            if process.poll() is None and time.monotonic() < start + limit:
                continue
            late = process.poll() is None
            if late:
                _stop(process)
            seconds = time.monotonic() - start
            reason = f"stopped after {limit:.0f} s" if late else None
            if not late and process.returncode:
                reason = f"exit status {process.returncode}"
            outcomes[name] = Outcome(reason is None, round(seconds, 1), reason)
            _keep_output(name, outcomes[name], output, log)
            del running[name]
    return outcomes


def _stop(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with contextlib.suppress(
        ProcessLookupError
    ):  # what it started may outlive it; they are a session of their own
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _keep_output(name: str, outcome: Outcome, output: Any, log: Path) -> None:
    output.seek(0)
    text = output.read().decode(errors="replace")
    output.close()
    title = f"== {name}: {'passed' if outcome.passed else outcome.reason} in {outcome.seconds:.1f} s"
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"{title}\n{text}\n")
    print(title, *text.splitlines()[-25:], sep="\n", flush=True)


class Check:
    """The jobs of a run: where things are, and how each part is called."""

    def __init__(self, out: Path, scratch: Path) -> None:
        self.out, self.scratch = out, scratch
        self.site, self.wheels = scratch / "site", scratch / "wheels"
        self.log = out / "log.txt"
        (scratch / "pytest.ini").write_text(
            "[pytest]\naddopts = --import-mode=importlib -q --tb=short -p no:cacheprovider\n"
            "markers =\n    gpu: needs a CUDA device\nxfail_strict = true\n",
            encoding="utf-8",
        )

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.site), str(self.wheels), os.environ.get("PYTHONPATH")]))
        return {
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic matrix products ask for
            "TOKENIZERS_PARALLELISM": "false",
        }

    def install_wheels(self) -> Job:
        wheels = sorted(map(str, (ROOT / "wheels").glob("*.whl")))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        return Job(
            "wheels",
            60,
            [*command, "--target", str(self.wheels), *wheels],
            missing=None if wheels else "there is no folder wheels/ with packages to add",
        )

    def build(self) -> Job:
        source = self.scratch / "source"
        shutil.copytree(
            ROOT,
            source,
            ignore=shutil.ignore_patterns(".venv", ".git", "wheels", "build", "__pycache__", ".*_cache"),
        )
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        return Job(
            "build",
            150,
            [*command, "--no-build-isolation", "--target", str(self.site), str(source)],
            {"SHIFCON_NATIVE": "1", "SHIFCON_CUDA": "1"},
        )

    def copy_sources(self) -> None:
        """What a build would have installed, but for the compiled libraries; Triton's kernels need no compiler."""
        shutil.rmtree(self.site, ignore_errors=True)
        unused = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / "shifcon_fast", self.site / "shifcon_fast", ignore=unused)
        shutil.copytree(ROOT / "kernels", self.site / "shifcon_fast" / "kernels", ignore=unused)

    def jobs(self, part: str) -> list[Job]:
        """The jobs of any part but ``build``."""
        benchmarks = ROOT / "benchmarks"
        models = [str(DEVICE_TESTS / f"test_{name}.py") for name in ("models", "training")]
        if part == "ceilings":
            command = [sys.executable, str(benchmarks / "ceilings.py"), str(self.out / "ceilings.json")]
            return [Job(part, 40, command, self.environment)]
        if part == "ops":
            ignored = [f"--ignore={path}" for path in models]
            tests = [str(CONTRACT), str(DEVICE_TESTS), *ignored]
            return [
                self._pytest("ops", 180, [*tests, "-k", f"not {LARGE}"], workers=6),
                self._pytest("ops_large", 180, [*tests, "-k", LARGE]),
            ]
        if part == "models":
            return [self._pytest(part, 180, models, workers=4)]
        if part == "sanitizer":
            return [self._sanitizer("memcheck"), self._sanitizer("racecheck")]
        if part == "step":
            command = [
                sys.executable,
                str(benchmarks / "step" / "run.py"),
                "--out",
                str(self.out),
                "--steps",
                "3",
            ]
            missing = (
                None if self._has("bitsandbytes") and self._has("peft") else "bitsandbytes or peft is missing"
            )
            return [Job(part, 130, command, self.environment, missing)]
        options = ["--benchmark-json", str(self.out / "benchmarks.json"), "--benchmark-columns", "median"]
        job = self._pytest(part, 400, [*options, str(benchmarks)])
        return [
            job if self._has("pytest_benchmark") else Job(part, 0, [], missing="pytest-benchmark is missing")
        ]

    def _pytest(self, name: str, seconds: int, arguments: list[str], workers: int = 0) -> Job:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(self.scratch / "pytest.ini"),
            "--rootdir",
            str(ROOT),
        ]
        if workers and self._has("xdist"):  # compiling kernels, not running them, is what takes the time
            command += ["-n", str(workers)]
        return Job(
            name,
            seconds,
            [*command, "--junitxml", str(self.out / f"{name}.xml"), *arguments],
            self.environment,
        )

    def _sanitizer(self, tool: str) -> Job:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        tests = [str(CONTRACT), str(DEVICE_TESTS)]
        run = [sys.executable, "-m", "pytest", "-c", str(self.scratch / "pytest.ini"), "--rootdir", str(ROOT)]
        # PyTorch's own allocator would hide an access past a tensor's end.
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        missing = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"
        return Job(tool, 170, [*command, *run, *tests, "-k", SANITIZED], environment, missing)

    def _has(self, module: str) -> bool:
        return find_spec(module) is not None or (self.wheels / module).is_dir()


def describe(check: Check, commit: str | None) -> dict[str, Any]:
    """Device, driver, versions, commit, and which backend each operator runs."""
    import torch

    found: dict[str, str | None] = {}
    brought = {
        d.metadata["Name"].lower(): d.version for d in metadata.distributions(path=[str(check.wheels)])
    }
    for package in PACKAGES:
        try:
            found[package] = brought.get(package) or metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    report = (
        "import json; from shifcon_fast import ops; print(json.dumps({f'{r.operator} on {r.device}': "
        "{'chosen': r.chosen, 'others': r.reasons} for r in ops.backend_report()}))"
    )
    backends = _output([sys.executable, "-c", report], check.environment).splitlines()
    return {
        "commit": commit or _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or None,
        "device": torch.cuda.get_device_name(),
        "driver": _output(["nvidia-smi", query, "--format=csv,noheader"]),
        "cuda": torch.version.cuda,
        "nvcc": _output([nvcc, "--version"]).splitlines()[-1:],
        "python": platform.python_version(),
        "packages": found,
        "backends": json.loads(backends[-1]) if backends else None,
    }


def _output(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(
            command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def selected(only: str | None) -> set[str]:
    """The parts that ``--only`` names, or all.

    Raises:
        SystemExit: an unknown one; the known ones are listed.
    """
    names = set(PARTS) if only is None else set(only.split(","))
    if unknown := sorted(names - set(PARTS)):
        raise SystemExit(f"--only: got {', '.join(unknown)}; wanted some of {', '.join(PARTS)}")
    return names


def run(out: Path, parts: set[str], commit: str | None) -> int:
    deadline = time.monotonic() + TOTAL_SECONDS
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        check = Check(out.resolve(), scratch)
        check.log.unlink(missing_ok=True)
        outcomes: dict[str, Outcome] = {}
        for job in (check.install_wheels(), check.build()):
            outcomes |= run_together([job], deadline, check.log, scratch)
        if not outcomes["build"].passed:
            check.copy_sources()
        for phase in PHASES:
            jobs = [job for part in phase if part in parts for job in check.jobs(part)]
            outcomes |= run_together(jobs, deadline, check.log, scratch)
        record = describe(check, commit)
    record["jobs"] = {name: vars(outcome) for name, outcome in outcomes.items()}
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    (out / "environment.json").write_text(text, encoding="utf-8")
    print(text)
    return int(any(outcome.passed is False for outcome in outcomes.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for everything that is written")
    parser.add_argument("--only", help=f"parts, with commas between them: {','.join(PARTS)}")
    parser.add_argument("--commit", help="what to record as the commit; by default git is asked")
    options = parser.parse_args(arguments)
    parts = selected(options.only)
    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError:
        found = False
    if not found:
        print(
            f"{sys.executable}: no PyTorch that sees a CUDA device; without one, make test checks all that can be "
            "checked",
            file=sys.stderr,
        )
        return 2
    return run(options.out, parts, options.commit)


if __name__ == "__main__":
    sys.exit(main())
