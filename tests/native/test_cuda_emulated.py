"""The CUDA library's sources on a machine without CUDA: compiled as C++ against ``emulated_gpu.h``, run by tests.

``tests/gpu/test_subspace_project.py`` runs against it three times: with several orders in which threads take turns,
and with numbers of multiprocessors that split the hidden size differently.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "csrc/cuda"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The emulated library; misaligned accesses, overflows and indices out of bounds of arrays end the process."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on the PATH to compile the CUDA sources for the CPU; install one to run this")
    folder = tmp_path_factory.mktemp("emulated")
    torch_folder = Path(torch.__file__).parent
    flags = [
        *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"),
        *("-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{SOURCES}", f"-I{Path(__file__).parent}"),
        *("-isystem", str(torch_folder / "include")),
        *("-isystem", str(torch_folder / "include/torch/csrc/api/include")),
    ]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [compiler, *flags, "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-4000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cu"))))
    result = folder / "emulated.so"
    linked = subprocess.run(
        [
            *(compiler, "-shared", "-fsanitize=undefined", *map(str, objects)),
            *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(result)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert linked.returncode == 0, linked.stderr[-4000:]
    yield result
    shutil.rmtree(folder)


@pytest.mark.slow("runs the CUDA kernels thread by thread on the CPU")
@pytest.mark.parametrize(("seed", "processors"), [(1, 4), (2, 132), (3, 1)])
def test_the_device_tests_on_the_emulator(library: Path, seed: int, processors: int) -> None:
    """Also that no more of them are left out than ask for CUDA itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "SHIFCON_REHEARSE": "1",
        "SHIFCON_EMULATED_LIBRARY": str(library),
        "SHIFCON_EMULATED_SEED": str(seed),
        "SHIFCON_EMULATED_PROCESSORS": str(processors),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    tests = REPOSITORY / "tests/gpu/test_subspace_project.py"
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "--tb=short"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(tests)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=REPOSITORY / "tests",  # the root has a folder that hides another package
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed, skipped = (re.search(rf"(\d+) {word}", result.stdout) for word in ("passed", "skipped"))
    assert passed is not None
    assert skipped is not None
    asks_for_cuda = len(re.findall(r"\(.*cuda: torch.device", tests.read_text(encoding="utf-8")))
    assert int(skipped[1]) == asks_for_cuda
    assert int(passed[1]) >= 50
