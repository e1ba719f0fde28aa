"""The CUDA sources compiled for three architectures, none of which is needed, against the committed table.

After a deliberate change: ``python scripts/cuda_resources.py --json tests/native/cuda_resources.json``.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("cuda_resources.json")
Row = dict[str, Any]


def script() -> ModuleType:
    if "cuda_resources" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "cuda_resources", REPOSITORY / "scripts/cuda_resources.py"
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["cuda_resources"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["cuda_resources"])
    return sys.modules["cuda_resources"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    """What ptxas says of every kernel, and the library."""
    if script().ninja_build().find_toolchain().nvcc is None:
        pytest.skip(
            "no nvcc on the PATH or in CUDA_HOME; install the CUDA toolkit to compile the CUDA sources"
        )
    return script().compile_all(tmp_path_factory.mktemp("cuda"))


compiles = pytest.mark.slow("compiles the CUDA sources for three architectures")


def by_kernel(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row["kernel"], row["architecture"]): row for row in rows}


@compiles
def test_what_nvcc_makes_of_every_kernel(compiled: tuple[list[Row], Path]) -> None:
    committed = by_kernel(json.loads(TABLE.read_text(encoding="utf-8")))
    found = by_kernel(compiled[0])
    assert len(found) == len(compiled[0])
    assert {architecture for _, architecture in found} == {"sm_80", "sm_90", "sm_100"}
    assert found.keys() == committed.keys()
    assert [kernel for kernel, row in found.items() if row["spills"] or row["stack"]] == []
    for what in ("registers", "shared"):
        above = {
            kernel: f"{row[what]} > {committed[kernel][what]}"
            for kernel, row in found.items()
            if row[what] > committed[kernel][what]
        }
        assert above == {}, what


def test_the_table_holds_every_kernel_without_spills() -> None:
    """Needs no compiler: what is committed is whole."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    assert [row for row in rows if row["spills"] or row["stack"]] == []
    named = {re.sub(r"<.*", "", row["kernel"]) for row in rows}
    written = set()
    for source in (REPOSITORY / "csrc/cuda").glob("*.cu*"):
        written |= set(
            re.findall(r"^SHIFCON_KERNEL\(.*?\) (\w+)\(", source.read_text(encoding="utf-8"), re.M)
        )
    assert named == written
    assert len(written) > 5


def test_reports_are_read_and_unknown_words_refused() -> None:
    report = (
        "ptxas info    : Compiling entry function "
        "'_ZN7shifcon10expand_mmaINS_7Float16ELi8EEEvNS_15ExpandArgumentsE' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN7shifcon10expand_mma\n"
        "    568 bytes stack frame, 604 bytes spill stores, 920 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem\n"
    )
    assert script().parse(report) == [
        {
            "kernel": "expand_mma<Float16, 8>",
            "architecture": "sm_90",
            "registers": 168,
            "spills": 1524,
            "stack": 568,
            "shared": 1024,
        }
    ]
    with pytest.raises(RuntimeError, match="words that are not known"):
        script().parse(report.replace("spill stores", "spilled"))


@compiles
def test_coefficients_come_from_l2_all_at_once(compiled: tuple[list[Row], Path]) -> None:
    """Sixteen loads of 128 bits before any of them is added; one after the other each would wait for L2."""
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("no cuobjdump on the PATH or in Triton; install either to look at the machine code")
    said = subprocess.run(
        [disassembler, "-sass", "-arch", "sm_90", str(compiled[1])],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kernels = re.split(r"Function : (\w+)", said)
    looked_at = 0
    for name, code in zip(kernels[1::2], kernels[2::2], strict=True):
        if "expand_mma" in name:
            looked_at += 1
            words = re.findall(r"\b(LDG\.E\.128|FADD|WARPSYNC)\b", code)
            runs = [len(list(group)) for word, group in itertools.groupby(words) if word == "LDG.E.128"]
            assert max(runs, default=0) >= 16, (name, runs)
    assert looked_at == 4


def find_disassembler() -> str | None:
    """NVIDIA's, of the toolkit or of Triton's wheel."""
    bundled = importlib.util.find_spec("triton")
    folders = [] if bundled is None else list(bundled.submodule_search_locations or [])
    places = [str(Path(folder) / "backends/nvidia/bin") for folder in folders]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))


# Symbols of the shared libraries that every machine has; PyTorch's are the C shim's alone.
SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(_ITM_\w+|__gmon_start__|__cxa_finalize)$")
SHIM = re.compile(r"^(aoti_torch|torch)_\w+$")


@compiles
def test_the_library_needs_nothing_but_the_stable_abi(compiled: tuple[list[Row], Path]) -> None:
    """It links without a PyTorch for CUDA, and asks PyTorch for functions of the C shim only, CUDA for none."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("no nm or readelf on the PATH; install binutils to look into the library")
    library = compiled[1]
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    unknown = [symbol for symbol in symbols if not SYSTEM.search(symbol) and not SHIM.match(symbol)]
    assert unknown == []
    assert "aoti_torch_get_current_cuda_stream" in symbols
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    assert not any(name.startswith(("libcuda", "libc10", "libtorch_python", "libpython")) for name in needed)
