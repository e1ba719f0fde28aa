"""Building, installing and loading the compiled libraries: with and without tools, whole and broken."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from shifcon_fast import _native

REPOSITORY = Path(__file__).resolve().parents[2]
# What PyTorch 2.10.0 exports of its C interface: `nm -D` of its libtorch_cpu and libtorch_cuda.
SHIM = Path(__file__).with_name("torch_2_10_shim.txt")

BUILT = next(Path(_native.__file__).parent.glob("cpu.*so"), None)
needs_library = pytest.mark.skipif(
    BUILT is None, reason="this installation has no compiled extension; install with --no-build-isolation"
)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and sys.platform == "linux"), reason="no g++ on this machine; install it"
)
needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("objdump")), reason="no nm and objdump here; install binutils"
)
builds = pytest.mark.slow("builds packages, some with a compiler")
needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")), reason="no nvcc here; install the CUDA toolkit"
)

_TRIAL_CU = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
__global__ void negate(float* x) { x[threadIdx.x] = -x[threadIdx.x]; }
torch::stable::Tensor run(torch::stable::Tensor x) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(x.get_device(), &stream);
  negate<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<float*>(x.data_ptr()));
  return x;
}
STABLE_TORCH_LIBRARY(shifcon_fast_cuda, m) { m.def("negate(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(shifcon_fast_cuda, CUDA, m) { m.impl("negate", TORCH_BOX(&run)); }
"""


def copy_sources(folder: Path) -> Path:
    """The source tree with as little C++ as makes a library; a stray file lies where a library would."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("CHANGELOG.md", "CITATION.cff"):
        shutil.copy(REPOSITORY / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("kernels", "shifcon_fast"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    (folder / "csrc/cpu").mkdir(parents=True)
    shutil.copy(REPOSITORY / "csrc/ninja_build.py", folder / "csrc")
    for header in (REPOSITORY / "csrc/cpu").glob("*.h"):
        shutil.copy(header, folder / "csrc/cpu")
    for name in ("library", "levels", "cache", "tensors"):
        shutil.copy(REPOSITORY / f"csrc/cpu/{name}.cpp", folder / "csrc/cpu")
    (folder / "shifcon_fast/_native/cpu.abi3.so").write_bytes(b"left by an editable install")
    return folder


def build(tree: Path, what: str, output: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one hook of the build backend, as pip does without isolation: wheel, sdist or metadata."""
    hook = {"wheel": "build_wheel", "sdist": "build_sdist", "metadata": "prepare_metadata_for_build_wheel"}[
        what
    ]
    output.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHIFCON_")}
    return subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{hook}({str(output)!r})"],
        cwd=tree,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def built(tree: Path, output: Path, **variables: str) -> tuple[Path, str]:
    """The wheel of a build that works, and everything the build printed."""
    result = build(tree, "wheel", output, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = output.glob("*.whl")
    return wheel, result.stdout + result.stderr


def libraries_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name.rsplit("/", 1)[1].split(".")[0] for name in archive.namelist() if name.endswith(".so")}


def run_installed(wheel: Path, folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code against the unpacked wheel, with nothing on the PATH."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PATH": "", **variables},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("source") / "tree")


@builds
@needs_compiler
def test_the_source_distribution_builds_one_wheel_for_every_python(tree: Path, tmp_path: Path) -> None:
    result = build(tree, "sdist", tmp_path / "sdist")
    assert result.returncode == 0, result.stderr
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.glob("shifcon_fast-*")
    assert {"csrc/ninja_build.py", "csrc/cpu/library.cpp", "csrc/cpu/levels.h", "kernels/info_nce.py"} <= {
        str(file.relative_to(unpacked)) for file in unpacked.rglob("*")
    }
    assert not list(unpacked.rglob("*.so"))
    wheel, _ = built(unpacked, tmp_path / "wheel", SHIFCON_NATIVE="1")
    platform = sysconfig.get_platform().replace("-", "_")
    assert wheel.name.endswith(f"-cp310-abi3-{platform}.whl")
    assert libraries_of(wheel) == {"cpu"}
    code = "import shifcon_fast._native as n; print(n.__file__, n.load('cpu'), n.cpu_level())"
    where, problem, level = run_installed(wheel, tmp_path / "installed", code).stdout.strip().split(" ", 2)
    assert where.startswith(str(tmp_path / "installed"))
    assert (problem, level in _native.LEVELS.values()) == ("None", True)


@builds
def test_without_a_compiler_the_package_works_and_says_how_to_get_the_rest(
    tree: Path, tmp_path: Path
) -> None:
    wheel, output = built(tree, tmp_path / "wheel", PATH="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries_of(wheel) == set()
    if sys.platform == "linux":
        assert output.count("warning: building shifcon_fast without the compiled extension: no") == 1
    code = """
import torch
from shifcon_fast import doctor, ops
x = torch.randn(2, 8)
ops.add_shift_rms_norm(x, torch.ones(8))
ops.add_shift_rms_norm(x, torch.ones(8))
print(doctor.describe(doctor.examine()))
"""
    result = run_installed(wheel, tmp_path / "installed", code)
    how = "run `pip install --no-build-isolation --no-deps --force-reinstall .`"
    assert result.stderr.count("SlowBackendWarning: ") == 1
    assert how in result.stderr
    (said,) = (line for line in result.stdout.splitlines() if how in line)  # once, not per operator
    assert said.split()[0] == "cpu"
    assert re.search(r"add_shift_rms_norm +cpu +reference", result.stdout)


@builds
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SHIFCON_NATIVE": "1", "PATH": ""}, r"error: (no C\+\+ compiler|ninja) was"),
        ({"SHIFCON_CUDA": "1", "PATH": ""}, r"error: (no C\+\+ compiler|ninja) was"),
        ({"SHIFCON_CUDA": "1", "SHIFCON_NATIVE": "0"}, "error: SHIFCON_CUDA=1 asks for a compiled library"),
        ({"SHIFCON_NATIVE": "yes"}, "error: SHIFCON_NATIVE: got 'yes'; wanted 0 or 1"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had_is_an_error(
    tree: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    result = build(tree, "metadata", tmp_path, **variables)
    assert result.returncode != 0
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


@builds
def test_left_out_on_request_although_it_could_be_compiled(tree: Path, tmp_path: Path) -> None:
    wheel, output = built(tree, tmp_path, SHIFCON_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries_of(wheel) == set()
    assert "without the compiled extension" not in output


@builds
@needs_compiler
def test_code_that_does_not_compile_is_an_error_with_the_compilers_words(tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken, ignore=shutil.ignore_patterns("build"))
    for source in (broken / "csrc/cpu").glob("*.cpp"):
        source.unlink()
    (broken / "csrc/cpu/library.cpp").write_text('int number = "text";\n', encoding="utf-8")
    result = build(broken, "wheel", tmp_path / "wheel")
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert not list((tmp_path / "wheel").glob("*.whl"))
    assert "library.cpp:1" in said
    assert "invalid conversion" in said or "cannot initialize" in said
    assert "SHIFCON_NATIVE=0 installs without it" in said
    assert "Traceback" not in said


@builds
@needs_compiler
@needs_nvcc
@needs_binutils
def test_a_machine_without_a_gpu_makes_a_gpu_wheel(tree: Path, tmp_path: Path) -> None:
    with_cuda = tmp_path / "tree"
    shutil.copytree(tree, with_cuda, ignore=shutil.ignore_patterns("build"))
    recipe = with_cuda / "csrc/ninja_build.py"
    text = recipe.read_text(encoding="utf-8")
    quicker = re.sub(r"(?m)^CUDA_ARCHITECTURES = .*", 'CUDA_ARCHITECTURES = ("80",)', text)
    assert quicker != text
    recipe.write_text(quicker, encoding="utf-8")
    (with_cuda / "csrc/cuda").mkdir()
    refused = build(with_cuda, "metadata", tmp_path / "none", SHIFCON_CUDA="1")
    assert "error: SHIFCON_CUDA=1, but there is no source in" in refused.stderr
    (with_cuda / "csrc/cuda/trial.cu").write_text(_TRIAL_CU, encoding="utf-8")
    refused = build(with_cuda, "metadata", tmp_path / "none", SHIFCON_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "error: SHIFCON_CUDA=1, but nvcc was not found" in refused.stderr

    wheel, _ = built(with_cuda, tmp_path / "both", SHIFCON_CUDA="1")
    assert libraries_of(wheel) == {"cpu", "cuda"}
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("shifcon_fast/_native/cuda.abi3.so", tmp_path))
    header = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED +(\S+)", header))
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    # CUDA's runtime is inside; and no path of the machine that built it.
    assert not any(name.startswith(("libcudart", "libc10", "libcuda.")) for name in needed)
    assert "RPATH" not in header
    assert "RUNPATH" not in header
    assert_only_the_shim_of_torch_2_10(library)
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    assert not re.search(r" cuda[A-Z]", exported.stdout)  # would stand in for PyTorch's own

    # The folder of that build is still there, and its CUDA library must not get into the next wheel.
    wheel, _ = built(with_cuda, tmp_path / "one", SHIFCON_CUDA="0")
    assert libraries_of(wheel) == {"cpu"}


def assert_only_the_shim_of_torch_2_10(library: Path) -> None:
    listed = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    wanted = [line.split()[-1] for line in listed.splitlines() if line.split()[0] == "U"]
    # What has a version is the C or C++ runtime's; the rest must be PyTorch's C interface, as old as we claim.
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
    # Where libtorch exports functions of the C++ runtime too (as 2.11 for CUDA), the linker leaves out the version.
    runtime = ctypes.CDLL("libstdc++.so.6")
    ours = {name for name in wanted if not system.search(name) and not hasattr(runtime, name)}
    assert "aoti_torch_abi_version" in ours
    assert ours <= set(SHIM.read_text(encoding="utf-8").split())


@needs_library
@needs_binutils
def test_the_library_needs_only_the_c_interface_of_torch_2_10_and_nothing_of_python() -> None:
    assert BUILT is not None
    assert_only_the_shim_of_torch_2_10(BUILT)


@needs_library
@needs_binutils
@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="levels exist on x86-64 only")
def test_no_instruction_beyond_the_baseline_outside_of_its_level() -> None:
    """A machine without AVX runs everything but the functions in shifcon::avx2 and shifcon::avx512."""
    code = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", BUILT], capture_output=True, text=True, check=True
    )
    wide = re.compile(r"%[yz]mm|\sv[a-z0-9]+\s[^#]*%xmm")
    found: dict[str, int] = {"baseline": 0, "avx2": 0, "avx512": 0, "other": 0}
    strays: set[str] = set()
    level, function = "other", ""
    for line in code.stdout.splitlines():
        if line.endswith(">:"):
            function = line.split(" ", 1)[1]
            named = re.search(r"shifcon::(baseline|avx2|avx512)::", function)
            level = named[1] if named else "other"
            continue
        found[level] += 1
        if level in ("baseline", "other") and wide.search(line):
            strays.add(function)
    assert not strays
    assert all(found.values()), found  # the names were there to judge by


@needs_library
def test_a_second_copy_is_refused_before_it_aborts_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BUILT is not None
    assert _native.load("cpu") is None
    monkeypatch.setenv("SHIFCON_NATIVE_LIBRARY", str(shutil.copy(BUILT, tmp_path / "cpu.abi3.so")))
    reason = _native.load.__wrapped__("cpu")
    assert reason is not None
    assert "another copy" in reason
    monkeypatch.delenv("SHIFCON_NATIVE_LIBRARY")
    assert _native.load.__wrapped__("cpu") is None  # the same file again is no other copy


_ASK = """
import json, torch
from shifcon_fast import doctor, ops
y = ops.masked_mean_pool(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.long))
reasons = {row.operator: row.reasons["native"] for row in ops.backend_report() if row.device == "cpu"}
print(json.dumps({"value": y.tolist(), "reasons": reasons, "doctor": doctor.native()["cpu"]}))
"""


@pytest.mark.parametrize(
    "broken", ["no library", pytest.param("another PyTorch", marks=needs_compiler), "missing"]
)
def test_a_library_that_does_not_load_is_a_reason_and_the_package_works(broken: str, tmp_path: Path) -> None:
    library = tmp_path / "cpu.abi3.so"
    cause = {"no library": "invalid ELF header", "another PyTorch": "aoti_torch_of_another_age"}.get(
        broken, "cannot open"
    )
    if broken == "no library":
        library.write_bytes(b"junk" * 1000)
    elif broken == "another PyTorch":
        source = tmp_path / "age.cpp"
        source.write_text(
            'extern "C" int aoti_torch_of_another_age();\nint age = aoti_torch_of_another_age();\n',
            encoding="utf-8",
        )
        subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    environment = {**os.environ, "SHIFCON_NATIVE_LIBRARY": str(library)}
    result = subprocess.run(
        [sys.executable, "-c", _ASK], env=environment, capture_output=True, text=True, check=True
    )
    told = json.loads(result.stdout)
    assert told["value"] == [[1.0] * 4]
    assert set(told["reasons"].values()) == {told["doctor"]}
    assert cause in told["doctor"]
    assert "does not load into torch" in told["doctor"]
    assert "run `pip install --no-build-isolation" in told["doctor"]
    assert result.stderr.count("SlowBackendWarning: ") == 1
