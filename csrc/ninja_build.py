"""Compiles csrc/ with ninja: what setup.py, `make sanitize` and the resource table of the CUDA sources share.

The CPU library holds every kernel three times. ``csrc/cpu/kernels/*.cpp`` is compiled once per *level* (a set of
vector instructions) into a namespace of its own, and ``csrc/cpu/levels.cpp`` picks one at the first call;
everything else is compiled for the baseline. Kernel files see no header that defines functions which the linker may
merge across files, so that no instruction of a higher level can reach a machine without it.

The libraries use PyTorch's stable ABI and nothing of Python's: one file serves every torch >= 2.10, every Python.
torch.utils.cpp_extension would do most of this, but it compiles every source with the same flags, and builds CUDA
sources only with a PyTorch that was built for CUDA.

Environment: CXX is the compiler (`ccache g++` works), CUDA_HOME the CUDA toolkit, MAX_JOBS how many compilers run
at a time. CXXFLAGS is not read: what is compiled must run on every machine of its architecture.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
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
    """What compiles: the programs, and PyTorch's headers and libraries.

    ``cxx`` is a command of one or more words; ``torch_cuda`` is the CUDA release that PyTorch was built for.
    """

    ninja: str
    cxx: tuple[str, ...]
    torch: Path
    nvcc: str | None = None
    torch_cuda: tuple[int, int] | None = None

    @property
    def includes(self) -> list[str]:
        """Preprocessor flags for PyTorch's stable headers."""
        folders = [self.torch / "include", self.torch / "include/torch/csrc/api/include"]
        # In two words: nvcc knows no other form.
        return [
            *(word for folder in folders for word in ("-isystem", str(folder))),
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        ]


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

    def link(
        self,
        objects: Sequence[Path],
        library: Path,
        flags: Sequence[str],
        *,
        rule: str = "link",
        after: Sequence[Path] = (),
    ) -> None:
        """Add the shared library that holds the objects; ``after`` must be there first."""
        listed, waits = (" ".join(map(_escape, paths)) for paths in (objects, after))
        self.statements.append(
            f"build {_escape(library)}: {rule} {listed} | {waits}\n  flags = {shlex.join(flags)}"
        )

    def stub(self, name: str) -> Path:
        """Add an empty library that is called ``name``; return its folder, for the linker to search.

        What is linked against it asks for the real one when it is loaded, and the build need not have that.
        """
        target = self.folder / "stubs" / name
        self.statements.append(f"build {_escape(target)}: stub\n  soname = {name}")
        return target.parent

    def run(self, *, verbose: bool = False) -> str:
        """Write the file and run ninja; return what ninja and the compilers printed.

        Raises:
            BuildError: a compiler failed; with its output.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        cxx, nvcc = shlex.join(self.toolchain.cxx), self.toolchain.nvcc
        rules = [_compile_rule("cxx", cxx, "C++"), _link_rule("link", cxx), _STUB_RULE.format(cxx=cxx)]
        if nvcc is not None:
            # nvcc links as well: it knows where its runtime lies.
            rules += [
                _compile_rule("nvcc", shlex.quote(nvcc), "CUDA"),
                _link_rule("nvlink", shlex.quote(nvcc)),
            ]
        text = "\n".join(["ninja_required_version = 1.5", *rules, *self.statements, ""])
        (self.folder / "build.ninja").write_text(text, encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS")
        command = [
            *(self.toolchain.ninja, "-C", str(self.folder)),
            *(["-v"] if verbose else []),
            *(["-j", jobs] if jobs else []),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        output = result.stdout + result.stderr
        if result.returncode != 0:
            raise BuildError(f"compiling {SOURCES.name}/ failed:\n{output}")
        if verbose:
            print(output, flush=True)
        return output


def _compile_rule(name: str, command: str, language: str) -> str:
    return (
        f"rule {name}\n  command = {command} -MD -MF $out.d $flags -c $in -o $out\n"
        f"  depfile = $out.d\n  deps = gcc\n  description = {language} $out"
    )


def _link_rule(name: str, command: str) -> str:
    return f"rule {name}\n  command = {command} -shared $in $flags -o $out\n  description = link $out"


_STUB_RULE = (
    "rule stub\n  command = {cxx} -shared -nostdlib -x c++ /dev/null -Wl,-soname,$soname -o $out\n"
    "  description = stub $out"
)


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def find_toolchain() -> Toolchain:
    """The programs that compile the libraries.

    PyTorch is found, not imported: a machine that builds for others may lack what its import needs.

    Raises:
        BuildError: one of them is missing; the message says which and what to do.
    """
    if sys.platform != "linux":
        raise BuildError(f"it is made for Linux, not for {sys.platform}")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "PyTorch is not there where the build runs; install torch first, then pass --no-build-isolation to pip"
        )
    folder = Path(spec.origin).resolve().parent
    about = runpy.run_path(str(folder / "version.py"))
    if _release(about["__version__"]) < OLDEST_TORCH:
        raise BuildError(f"torch {about['__version__']} is too old for its stable ABI; install torch >= 2.10")
    # Where the environment's bin/ is not on the PATH, the ninja package knows where its program is.
    ninja = shutil.which("ninja") or _packaged_ninja()
    if ninja is None:
        raise BuildError("ninja was not found; `pip install ninja`")
    return Toolchain(
        ninja, _find_cxx(), folder, _find_nvcc(), _release(about["cuda"]) if about.get("cuda") else None
    )


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _packaged_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return None
    return shutil.which("ninja", path=ninja.BIN_DIR)


def _find_cxx() -> tuple[str, ...]:
    asked = shlex.split(os.environ.get("CXX", ""))
    for words in [asked] if asked else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(words[0]):
            return tuple(words)
    wanted = f"CXX={asked[0]}" if asked else "g++, clang++, c++"
    raise BuildError(f"no C++ compiler was found (looked for {wanted}); install g++ or clang++")


def _find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def cuda_problem(toolchain: Toolchain) -> str | None:
    """Why the CUDA library cannot be compiled here, or ``None`` if it can."""
    if not list((SOURCES / "cuda").glob("*.cu")):
        return f"there is no source in {SOURCES / 'cuda'}"
    if toolchain.nvcc is None:
        return "nvcc was not found; install the CUDA toolkit, or set CUDA_HOME to where it is"
    return None


def nvcc_release(nvcc: str) -> tuple[int, int]:
    """The CUDA release that ``nvcc`` belongs to.

    Raises:
        BuildError: it does not run, or does not say.
    """
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", told.stdout)
    if found is None:
        raise BuildError(f"{nvcc} --version does not name its release: {told.stdout}{told.stderr}")
    return _release(found[1])


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
    library = library.resolve()  # ninja runs in the folder of the object files
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
    plan.link(objects, library, [*extra, *_link_flags(toolchain, "torch_cpu"), "-Wl,--as-needed"])
    library.parent.mkdir(parents=True, exist_ok=True)
    plan.run(verbose=verbose)


def supported_architectures(nvcc: str) -> tuple[str, ...]:
    """Those of :data:`CUDA_ARCHITECTURES` that ``nvcc`` knows; what it does not know runs the newest one's PTX.

    Raises:
        BuildError: it knows none.
    """
    told = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = set(told.stdout.split())
    found = tuple(number for number in CUDA_ARCHITECTURES if f"compute_{number}" in known)
    if not found:
        raise BuildError(f"{nvcc} compiles for none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}: {told.stderr}")
    return found


def cuda_flags(toolchain: Toolchain, architectures: Sequence[str] = CUDA_ARCHITECTURES) -> list[str]:
    """nvcc's flags: machine code for every architecture, and PTX of the last one for those to come."""
    flags = ["-std=c++17", "-O3", "-lineinfo", "-DUSE_CUDA", *toolchain.includes, f"-I{SOURCES / 'cuda'}"]
    flags += ["-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "-Xcompiler=-Wall"]
    for architecture in architectures:
        flags.append(f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    last = architectures[-1]
    return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def build_cuda(
    toolchain: Toolchain,
    library: Path,
    folder: Path,
    *,
    extra: Sequence[str] = ("--threads=0",),
    verbose: bool = False,
) -> str:
    """Compile csrc/cuda into ``library``. Needs nvcc, but neither a GPU nor a PyTorch with CUDA.

    ``extra`` flags reach nvcc where it compiles: by default, all architectures at the same time.

    Returns:
        What the compilers printed.

    Raises:
        BuildError: there is no nvcc, or it failed.
    """
    problem = cuda_problem(toolchain)
    if problem is not None:
        raise BuildError(problem)
    assert toolchain.nvcc is not None
    library = library.resolve()
    plan = Plan(toolchain, folder)
    flags = [*cuda_flags(toolchain, supported_architectures(toolchain.nvcc)), *extra]
    objects = [plan.compile_cuda(source, flags) for source in sorted((SOURCES / "cuda").glob("*.cu"))]
    # Part of the C shim (streams) lies in PyTorch's CUDA library, which the machine that builds may not have.
    # CUDA's own runtime is linked in, and hidden, so that it never stands in for the one that PyTorch brings.
    stubs = plan.stub("libtorch_cuda.so")
    needed = ["-Xlinker=--no-as-needed", f"-L{stubs}", "-ltorch_cuda", *_link_flags(toolchain, "torch_cpu")]
    hidden = ["-cudart=static", "-Xlinker=--exclude-libs,libcudart_static.a"]
    plan.link(objects, library, [*needed, *hidden], rule="nvlink", after=[stubs / "libtorch_cuda.so"])
    library.parent.mkdir(parents=True, exist_ok=True)
    return plan.run(verbose=verbose)


def _link_flags(toolchain: Toolchain, library: str) -> list[str]:
    # No rpath: PyTorch is loaded, by the import that precedes ours, wherever it lies on the user's machine.
    return [f"-L{toolchain.torch / 'lib'}", f"-l{library}"]
