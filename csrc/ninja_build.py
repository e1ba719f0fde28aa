"""Compiles csrc/ with ninja: what setup.py, `make sanitize` and the resource table of the CUDA sources share.

The CPU library holds every kernel three times. ``csrc/cpu/kernels/*.cpp`` is compiled once per *level* (a set of
vector instructions) into a namespace of its own, and ``csrc/cpu/levels.cpp`` picks one when the library is loaded;
everything else is compiled for the baseline. Kernel files see no header that defines functions which the linker may
merge across files, so that no instruction of a higher level can reach a machine without it.

The libraries use PyTorch's stable ABI and nothing of Python's: one file serves every torch >= 2.10, every Python.
torch.utils.cpp_extension would do most of this, but it compiles every source with the same flags, and builds CUDA
sources only with a PyTorch that was built for CUDA.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
OLDEST_TORCH = (2, 10)

_X86_LEVELS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
}
LEVELS = _X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ()}

CUDA_ARCHITECTURES = ("80", "90", "100")


class BuildError(RuntimeError):
    """The libraries cannot be compiled here; the message says what is missing or what the compiler said."""


@dataclass(frozen=True)
class Toolchain:
    """What compiles: paths of the programs, and PyTorch's headers and libraries."""

    ninja: str
    cxx: str
    torch: Path
    nvcc: str | None = None

    @property
    def includes(self) -> list[str]:
        """Preprocessor flags for PyTorch's stable headers."""
        folders = [self.torch / "include", self.torch / "include/torch/csrc/api/include"]
        return [f"-isystem{folder}" for folder in folders] + [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


@dataclass
class Plan:
    """A ninja file in the making."""

    toolchain: Toolchain
    folder: Path
    statements: list[str] = field(default_factory=list)

    def compile(self, source: Path, flags: Sequence[str], *, tag: str = "") -> Path:
        """Add one C++ source; return its object file."""
        target = self.folder / f"{source.stem}{tag}.o"
        return self._compile("cxx", source, target, flags)

    def compile_cuda(self, source: Path, flags: Sequence[str]) -> Path:
        """Add one CUDA source; return its object file."""
        return self._compile("nvcc", source, self.folder / f"{source.stem}.cuda.o", flags)

    def _compile(self, rule: str, source: Path, target: Path, flags: Sequence[str]) -> Path:
        self.statements.append(
            f"build {_escape(target)}: {rule} {_escape(source)}\n  flags = {shlex.join(flags)}"
        )
        return target

    def link(self, objects: Sequence[Path], library: Path, flags: Sequence[str]) -> None:
        """Add the shared library that holds the objects."""
        listed = " ".join(map(_escape, objects))
        self.statements.append(f"build {_escape(library)}: link {listed}\n  flags = {shlex.join(flags)}")

    def run(self, *, verbose: bool = False) -> None:
        """Write the file and run ninja.

        Raises:
            BuildError: a compiler failed; with its output.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tools = self.toolchain
        rules = [
            f"rule cxx\n  command = {shlex.quote(tools.cxx)} -MD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = C++ $out",
            f"rule link\n  command = {shlex.quote(tools.cxx)} -shared $in $flags -o $out\n"
            "  description = link $out",
        ]
        if tools.nvcc is not None:
            rules.append(
                f"rule nvcc\n  command = {shlex.quote(tools.nvcc)} -MD -MF $out.d $flags -c $in -o $out\n"
                "  depfile = $out.d\n  deps = gcc\n  description = CUDA $out"
            )
        text = "\n".join(["ninja_required_version = 1.5", *rules, *self.statements, ""])
        (self.folder / "build.ninja").write_text(text, encoding="utf-8")
        command = [tools.ninja, "-C", str(self.folder), *(["-v"] if verbose else [])]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if verbose or result.returncode != 0:
            print(result.stdout + result.stderr, flush=True)
        if result.returncode != 0:
            raise BuildError(f"compiling csrc/ failed:\n{(result.stdout + result.stderr)[-3000:]}")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def find_toolchain() -> Toolchain:
    """The programs that compile the libraries.

    Raises:
        BuildError: one of them is missing; the message says which and what to do.
    """
    try:
        import torch
    except ImportError:
        raise BuildError(
            "PyTorch is not installed where the build runs; install torch first and pass --no-build-isolation"
        ) from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise BuildError(f"torch {torch.__version__} has no stable ABI for this; install torch >= 2.10")
    # Where the environment's bin/ is not on the PATH, the ninja package knows where its program is.
    ninja = shutil.which("ninja") or _packaged_ninja()
    if ninja is None:
        raise BuildError("ninja was not found; `pip install ninja`")
    wanted = os.environ.get("CXX", "").split() or ["g++", "clang++", "c++"]
    cxx = next(filter(None, map(shutil.which, wanted)), None)
    if cxx is None:
        raise BuildError(
            f"no C++ compiler was found (looked for {', '.join(wanted)}); install g++ or clang++"
        )
    return Toolchain(ninja, cxx, Path(torch.__file__).resolve().parent, _find_nvcc())


def _packaged_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return None
    return shutil.which("ninja", path=ninja.BIN_DIR)


def _find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


# Denormals, NaN and signed zeros keep their meaning: of the fast-math family only contraction into fused
# multiply-adds is wanted, which rounds less, and no errno.
_KERNEL_FLAGS = (
    *("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    # Vectors never cross a call; GCC 12's own AVX-512 header looks uninitialised to it.
    *("-Wno-psabi", "-Wno-maybe-uninitialized"),
)
_COMMON_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type")


def build_cpu(
    toolchain: Toolchain,
    library: Path,
    folder: Path,
    *,
    extra: Sequence[str] = (),
    verbose: bool = False,
) -> None:
    """Compile csrc/cpu into ``library``; object files go to ``folder``. ``extra`` flags also reach the linker.

    Raises:
        BuildError: see :meth:`Plan.run`.
    """
    plan = Plan(toolchain, folder)
    common = [*_COMMON_FLAGS, f"-I{SOURCES / 'cpu'}", *extra]
    levels = [f"-DSHIFCON_HAS_{level.upper()}" for level in LEVELS]
    objects = [
        plan.compile(source, [*common, "-O2", *levels, *toolchain.includes])
        for source in sorted((SOURCES / "cpu").glob("*.cpp"))
    ]
    for level, flags in LEVELS.items():
        for source in sorted((SOURCES / "cpu/kernels").glob("*.cpp")):
            chosen = [*common, *_KERNEL_FLAGS, *flags, f"-DSHIFCON_LEVEL={level}"]
            objects.append(plan.compile(source, chosen, tag=f".{level}"))
    plan.link(objects, library, [*extra, *_link_flags(toolchain, "torch_cpu")])
    library.parent.mkdir(parents=True, exist_ok=True)
    plan.run(verbose=verbose)


def cuda_flags(toolchain: Toolchain, architectures: Sequence[str] = CUDA_ARCHITECTURES) -> list[str]:
    """nvcc's flags: machine code for every architecture, and PTX of the last one for those to come."""
    flags = [*("-std=c++17", "-O3", "--use_fast_math=false", "-lineinfo", "-DUSE_CUDA"), *toolchain.includes]
    flags += ["-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", f"-I{SOURCES / 'cuda'}"]
    for architecture in architectures:
        flags.append(f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    last = architectures[-1]
    return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def build_cuda(toolchain: Toolchain, library: Path, folder: Path, *, verbose: bool = False) -> None:
    """Compile csrc/cuda into ``library``. Needs nvcc, but neither a GPU nor a PyTorch with CUDA.

    Raises:
        BuildError: there is no nvcc, or it failed.
    """
    if toolchain.nvcc is None:
        raise BuildError("nvcc was not found; install the CUDA toolkit, or set CUDA_HOME to where it is")
    plan = Plan(toolchain, folder)
    flags = cuda_flags(toolchain)
    objects = [plan.compile_cuda(source, flags) for source in sorted((SOURCES / "cuda").glob("*.cu"))]
    runtime = Path(toolchain.nvcc).resolve().parents[1] / "lib64"
    plan.link(objects, library, [f"-L{runtime}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"])
    library.parent.mkdir(parents=True, exist_ok=True)
    plan.run(verbose=verbose)


def _link_flags(toolchain: Toolchain, library: str) -> list[str]:
    # No rpath: PyTorch is loaded, by the import that precedes ours, wherever it lies on the user's machine.
    return [f"-L{toolchain.torch / 'lib'}", f"-l{library}", "-Wl,--as-needed"]
