"""The parts of ``gpu_check.py``: where things are in a run, and which commands each part is."""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_wheels
from gpu_jobs import Job

ROOT = Path(__file__).resolve().parents[1]
CONTRACT, DEVICE_TESTS = ROOT / "tests" / "contract", ROOT / "tests" / "gpu"
BENCHMARKS = ROOT / "benchmarks"
# The suites that need PyTorch and Triton alone; those of models are for a machine with everything (make bench).
_OPERATORS = ("norm", "pooling", "contrastive", "projection", "host", "denormals")
STUB = ROOT / "tests" / "scripts" / "stub"
GROUPS = ("norm", "info_nce", "projection", "host", "info_nce_65536")
UNWANTED = (".venv", ".git", "wheels", "build", "dist", "__pycache__", ".*_cache", "*.egg-info", "*.so")
CUDA_PROGRAMS = str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
# Small shapes of every kernel; the names are those of the contract's and of tests/gpu's tests.
SANITIZED = (
    "(test_values_and_gradients and 7-) or (test_values_and_gradient and shape1) or index_per_row or small_values"
    " or (test_loss and (shape2 or shape4)) or (test_similarity and shape0)"
)
SMALL = "one_small_call"
LARGE = "two_to_the_31"  # tests that take tens of GiB each
CAPTURES = "captured or cuda_graphs"  # tests after which, if they fail, a process may have lost the device


class Check:
    """The jobs of a run: where things are, and how each part is called."""

    def __init__(self, out: Path, scratch: Path, options: argparse.Namespace) -> None:
        self.out, self.scratch = out, scratch
        self.site, self.wheels = scratch / "site", scratch / "wheels"
        self.log, self.tests = out / "log.txt", out / "tests.jsonl"
        self.options = options
        self.rehearsed = os.environ.get("SHIFCON_REHEARSE") == "1"
        (scratch / "pytest.ini").write_text(
            "[pytest]\naddopts = --import-mode=importlib -q --tb=short -p no:cacheprovider\n"
            "xfail_strict = true\n"
            "markers =\n    gpu: needs a CUDA device\n    small: few and quick\n    slow(reason): takes long\n",
            encoding="utf-8",
        )

    @property
    def environment(self) -> dict[str, str]:
        folders = [str(self.site), str(self.wheels), str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, folders)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.scratch / "cache-of-triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "cache-of-inductor"),
            # Several processes compile at a time, and each would start a pool as large as the machine.
            "TORCHINDUCTOR_COMPILE_THREADS": "2",
            # A rehearsal's machine has few cores, and others' work on them: threads would wait for each other.
            "OMP_NUM_THREADS": "1" if self.rehearsed else "2",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic matrix products ask for
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",  # nothing is waited for that cannot be reached
            **dict(pair.partition("=")[::2] for pair in self.options.env),
        }

    @property
    def timed(self) -> dict[str, str]:
        """The environment of what is timed: a rehearsal's stub of the device is for these parts."""
        environment = self.environment
        if self.rehearsed:
            environment["PYTHONPATH"] = os.pathsep.join([str(STUB), environment["PYTHONPATH"]])
        return environment

    def install_wheels(self) -> Job:
        skipped = tuple(name.replace("-", "_") + "-" for name in (gpu_wheels.OURS, *self.options.no_wheel))
        brought = [f for f in sorted((ROOT / "wheels").glob("*.whl")) if not f.name.startswith(skipped)]
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
        ]
        missing = None if brought else "there is no folder wheels/ with packages to add"
        if self.rehearsed:
            missing = "the wheels are for the device's Python; a rehearsal has what is installed here"
        target = ["--no-cache-dir", "--upgrade", "--target", str(self.wheels)]
        return Job("wheels", [*command, *target, *map(str, brought)], missing=missing)

    def take_sources(self) -> str | None:
        """What an installation would hold, with the libraries of the wheel; why it holds none, else ``None``."""
        # A rehearsal runs on the CPU library of the checkout, if it has one.
        unused = shutil.ignore_patterns("__pycache__", *(() if self.rehearsed else ("*.so",)))
        shutil.copytree(ROOT / "shifcon_fast", self.site / "shifcon_fast", ignore=unused, dirs_exist_ok=True)
        shutil.copytree(
            ROOT / "kernels", self.site / "shifcon_fast" / "kernels", ignore=unused, dirs_exist_ok=True
        )
        wheel = gpu_wheels.wheel_of(ROOT / "wheels", gpu_wheels.OURS)
        recorded = ROOT / "wheels" / "csrc.sha256"
        if self.rehearsed:
            return None
        if self.options.build or wheel is None or not recorded.exists():
            return "--build was given" if self.options.build else "wheels/ has no wheel of this package"
        if recorded.read_text(encoding="utf-8").strip() != gpu_wheels.digest():
            return "the wheel in wheels/ is not of csrc/ as it is"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("shifcon_fast/_native/") and name.endswith(".so"):
                    archive.extract(name, self.site)
        return None

    def build(self) -> Job:
        source = self.scratch / "source"
        ignored = shutil.ignore_patterns(*UNWANTED)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        return Job(
            "build",
            [*command, "--no-build-isolation", "--target", str(self.site), str(source)],
            {"SHIFCON_NATIVE": "1", "SHIFCON_CUDA": "1"},
            before=lambda: shutil.copytree(ROOT, source, ignore=ignored, dirs_exist_ok=True),
        )

    def jobs(self, part: str) -> list[Job]:
        """The jobs of any part but ``load``."""
        models = [str(DEVICE_TESTS / f"test_{name}.py") for name in ("models", "training")]
        operators = [str(CONTRACT), str(DEVICE_TESTS), *(f"--ignore={path}" for path in models)]
        apart = f"not {LARGE} and not ({CAPTURES}) and not {SMALL}"
        if part == "ceilings":
            command = [sys.executable, str(BENCHMARKS / "ceilings.py"), str(self.out / "ceilings.json")]
            return [Job(part, [*command, *(["--smoke"] if self.rehearsed else [])], self.timed)]
        if part == "small":
            return [self._pytest(part, [str(DEVICE_TESTS / "test_operators.py")], SMALL)]
        if part == "contract":
            return [self._pytest(part, [*operators, "--maxfail=40"], apart, workers=6, continues=True)]
        if part == "captures":
            return self._captures()
        if part == "models":
            return [self._pytest(part, models, f"not ({CAPTURES})", workers=3)]
        if part == "large":
            return [self._pytest(part, [str(CONTRACT), str(DEVICE_TESTS)], LARGE)]
        if part in ("step", "variants"):
            return [self._step(part)]
        if part == "memcheck":
            return [self._sanitizer("memcheck", SMALL, (str(DEVICE_TESTS / "test_operators.py"),))]
        if part == "sanitizer":
            tests = (str(CONTRACT), str(DEVICE_TESTS))
            return [self._sanitizer(tool, SANITIZED, tests, "_all") for tool in ("memcheck", "racecheck")]
        if part == "warm":
            return self._warm()
        if part == "missed":
            return [self._benchmarks(part, ["--missed", str(self.options.after)])]
        return [self._benchmarks(part, ["--goals", part] if part in GROUPS else [])]

    def _warm(self) -> list[Job]:
        """Compile what this call will time: a process for each group, or one for what the first call missed."""
        if self.options.after is not None:
            return [self._benchmarks("warm", ["--missed", str(self.options.after), "--warm"])]
        groups = ("norm", "info_nce", "projection")
        return [self._benchmarks(f"warm_{group}", ["--goals", group, "--warm"]) for group in groups]

    def _captures(self) -> list[Job]:
        """A process each: a capture that fails may leave its process without a device."""
        chosen = {
            "capture_norm": ("operators", "captured and norm"),
            "capture_pool": ("operators", "captured and pool"),
            "capture_contrast": ("operators", "captured and contrast"),
            "capture_loss": ("operators", "captured and loss"),
            "capture_project": ("operators", "captured and project"),
            "capture_library": ("subspace_project", "captured"),
            "capture_model": ("models", "captured"),
            "capture_compiled": ("models", "cuda_graphs"),
        }
        return [
            self._pytest(name, [str(DEVICE_TESTS / f"test_{file}.py")], keyword, continues=True)
            for name, (file, keyword) in chosen.items()
        ]

    def _run_pytest(self) -> list[str]:
        return [
            *(sys.executable, "-m", "pytest", "-c", str(self.scratch / "pytest.ini"), "--rootdir", str(ROOT)),
            *("-p", "gpu_record"),
        ]

    def _recorded(self, name: str, before: Iterable[str] = ()) -> tuple[list[str], Any]:
        """pytest's arguments to record, and to leave out what ended; what writes down, at each start, what did."""
        done, kept = self.scratch / f"{name}.done", list(before)

        def write() -> None:
            ended = [row["id"] for row in read_rows(self.tests) if row["part"] == name]
            done.write_text("\n".join([*kept, *ended]), encoding="utf-8")

        return ["--record", str(self.tests), "--record-part", name, "--done", str(done)], write

    def _pytest(
        self, name: str, arguments: list[str], keyword: str, *, workers: int = 0, continues: bool = False
    ) -> Job:
        command = self._run_pytest()
        if workers and self._has("xdist"):  # compiling kernels, not running them, is what takes the time
            command += ["-n", str(self.options.workers or workers)]
        if self.options.keyword:
            keyword = f"({keyword}) and ({self.options.keyword})"
        passed: list[str] = []
        if continues and self.options.after is not None:  # what the first call saw pass need not run again
            rows = read_rows(self.options.after / "tests.jsonl")
            passed = [row["id"] for row in rows if row["outcome"] == "passed"]
        record, before = self._recorded(name, passed)
        return Job(name, [*command, *record, *arguments, "-k", keyword], self.environment, before=before)

    def _benchmarks(self, name: str, arguments: list[str]) -> Job:
        if not self._has("pytest_benchmark"):
            return Job(name, [], missing="pytest-benchmark is missing")
        files = [
            *(str(BENCHMARKS / f"test_{name}.py") for name in _OPERATORS),
            "--ceilings",
            str(self.out / "ceilings.json"),
        ]
        # Compiling is no measurement: it leaves no rows.
        rows = [] if name.startswith("warm") else ["--rows", str(self.out / "benchmarks.jsonl")]
        record, before = self._recorded(name)
        smoke = ["--smoke"] if self.rehearsed else []
        command = [*self._run_pytest(), *record, *files, *rows, *arguments, *smoke]
        if self.options.keyword:
            command += ["-k", self.options.keyword]
        return Job(name, [*command, "--benchmark-quiet"], self.timed, before=before)

    def _step(self, name: str) -> Job:
        command = [sys.executable, str(BENCHMARKS / "step" / "run.py"), "--out", str(self.out)]
        chosen = ["--steps", "2"]
        for variant in ("plain QLoRA", "authors' recipe", "ours") if name == "step" else ():
            chosen += ["--variant", variant]
        tiny = ["--size", "tiny", "--device", "cpu"] if self.rehearsed else ["--size", self.options.size]
        found = self._has("bitsandbytes") and self._has("peft")
        missing = None if found else "bitsandbytes or peft is missing"
        return Job(name, [*command, *chosen, *tiny], self.environment, missing)

    def _sanitizer(self, tool: str, keyword: str, tests: Sequence[str], suffix: str = "") -> Job:
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA_PROGRAMS)
        command = [
            program or "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--print-limit",
            "20",
        ]
        command += ["--target-processes", "application-only"]
        for name in () if self.options.no_kernel_filter else kernel_names():
            command += ["--kernel-name", f"kns={name}"]
        record, before = self._recorded(tool + suffix)
        run = [*self._run_pytest(), *record, *tests, "-k", keyword]
        # PyTorch's own allocator would hide an access past a tensor's end.
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        missing = None if program else "compute-sanitizer is not installed"
        return Job(tool + suffix, [*command, *run], environment, missing, before)

    def _has(self, module: str) -> bool:
        return find_spec(module) is not None or (self.wheels / module).is_dir()


def kernel_names() -> list[str]:
    """Triton's kernels by their names, and the namespace of those in the CUDA library."""
    found = ["shifcon"]
    for file in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(d) for d in node.decorator_list
            ):
                found.append(node.name)
    return found


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; the first of each test, which is the one that knows why it failed."""
    if not file.exists():
        return []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault((row["part"], row["id"]), row)
    return list(rows.values())
