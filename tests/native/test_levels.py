"""The same operators at every level of vector instructions, and nothing of a level where it does not belong."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shifcon_fast import _native

REPOSITORY = Path(__file__).resolve().parents[2]
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
# What the tests marked small are about; tests/contract as a whole runs at the best level.
SMALL = {
    "test_norm.py::test_values_and_gradients",
    "test_pooling.py::test_values_and_gradient",
    "test_contrastive.py::test_loss",
    "test_contrastive.py::test_similarity",
    "test_levels.py::test_this_process_runs_the_level_that_it_should",
}

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="levels exist on x86-64 only"
)


@pytest.mark.small
def test_this_process_runs_the_level_that_it_should(best_level: int) -> None:
    """Also run by the test below, in processes that ask for a level. Unasked, Intel's multiply no pairs."""
    problem = _native.load("cpu")
    if problem is not None:
        pytest.skip(problem)
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    asked = os.environ.get("SHIFCON_CPU_LEVEL", "avx512" if intel else LEVELS[-1])
    assert torch.ops.shifcon_fast_cpu.level() == min(best_level, LEVELS.index(asked))


def test_an_unknown_level_is_a_reason_not_to_run() -> None:
    code = "from shifcon_fast import _native; print(_native.load('cpu')); print(_native.cpu_level())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SHIFCON_CPU_LEVEL": "avx-2"},
        capture_output=True,
        text=True,
        check=True,
    )
    reason, level = result.stdout.splitlines()
    assert reason.startswith("SHIFCON_CPU_LEVEL: got 'avx-2'; wanted one of baseline, avx2, avx512,")
    assert level == "None"


@pytest.mark.slow("runs the contract again at every instruction level, each in its own process")
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_keeps_the_contract(level: str, best_level: int) -> None:
    problem = _native.load("cpu")
    if problem is not None:
        pytest.skip(problem)
    if LEVELS.index(level) > best_level:
        pytest.skip(f"this processor has no {level}")
    if "SHIFCON_CPU_LEVEL" in os.environ:
        pytest.skip("this is the process of one level; run without SHIFCON_CPU_LEVEL to start all of them")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rA",
        "-p",
        "no:cacheprovider",
        "-m",
        "small",
    ]
    result = subprocess.run(
        [*command, __file__, str(REPOSITORY / "tests" / "contract")],
        env={**os.environ, "SHIFCON_CPU_LEVEL": level, "SHIFCON_CONTRACT": "native", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert set(re.findall(r"^PASSED \S*?(\w+\.py::\w+)", result.stdout, re.M)) >= SMALL


def ninja_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("levels_ninja_build", REPOSITORY / "csrc/ninja_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow("compiles all kernels of a level")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here; install binutils")
def test_files_of_a_level_define_its_kernels_and_nothing_else(tmp_path: Path) -> None:
    """A weak symbol of theirs could stand in for the baseline's, on a machine without the instructions."""
    build = ninja_build()
    try:
        tools = build.find_toolchain()
    except build.BuildError as error:
        pytest.skip(str(error))
    plan = build.Plan(tools, tmp_path)
    flags = [*build._COMMON_FLAGS, f"-I{build.SOURCES / 'cpu'}", *build._KERNEL_FLAGS, *build.LEVELS["avx2"]]
    sources = sorted((build.SOURCES / "cpu/kernels").glob("*.cpp"))
    objects = [plan.compile(source, [*flags, "-DSHIFCON_LEVEL=avx2"]) for source in sources]
    plan.run()
    for file in objects:
        listed = subprocess.run(["nm", "-C", file], capture_output=True, text=True, check=True).stdout
        kinds = [line[17:].split(maxsplit=1) for line in listed.splitlines()]
        # Local symbols are in lower case, U is defined elsewhere; what is left is seen by other files.
        seen = [
            (kind, name)
            for kind, name in kinds
            if (kind.isupper() and kind != "U") or kind in ("u", "v", "w")
        ]
        kernels = [name for kind, name in seen if kind == "T" and name.startswith("shifcon::avx2::")]
        assert kernels
        # The address of the C++ runtime's own exception handler, not code.
        rest = {name for _, name in seen} - set(kernels)
        assert rest <= {"DW.ref.__gxx_personality_v0"}, f"{file.name} also defines {rest}"
