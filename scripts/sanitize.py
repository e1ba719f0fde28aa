"""Runs the operator tests on a CPU library that is compiled with sanitizers; fails on any report.

    python scripts/sanitize.py address            (addresses and undefined behaviour)
    python scripts/sanitize.py thread
    python scripts/sanitize.py address --baseline -- tests/native -k norm       (what pytest is given)

The library is compiled into a temporary folder, and the sanitizer's runtime is loaded into Python before everything
else (LD_PRELOAD), because Python itself is not compiled with it. Needs g++ with libasan, libubsan and libtsan.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/contract",
    *(
        f"tests/native/test_{name}.py"
        for name in ("norm", "pooling", "contrastive", "projection", "past_cache")
    ),
)

# Shapes stay small: those that are about sizes, memory or speed show no access that a small one does not.
SMALL = "not long_rows and not hidden_sizes and not attached and not one_graph and not memory and not exponentials"

_FLAGS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}
_RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
_OPTIONS = {
    "address": {
        # Python keeps what it allocates until the process ends, and so does PyTorch: leaks of an extension drown in
        # that. Memory that malloc returns is filled with what no test expects.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=99:max_malloc_fill_size=1000000000"
        ":malloc_fill_byte=254",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
    },
    # Python and PyTorch are not compiled with it, so what they do among themselves cannot be judged.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=99"},
}


class SanitizerMissing(RuntimeError):
    """The compiler has no such sanitizer; the message says which file is not there."""


def load_build(sources: Path = REPOSITORY / "csrc") -> ModuleType:
    """The module ninja_build of ``sources``, apart from any other copy: it compiles the sources beside it."""
    spec = importlib.util.spec_from_file_location("sanitized_ninja_build", sources / "ninja_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def build(kind: str, folder: Path, *, baseline_only: bool = False, sources: Path | None = None) -> Path:
    """Compile csrc/cpu (or a copy of csrc at ``sources``) for a sanitizer.

    Args:
        kind: "address" (with undefined behaviour) or "thread".
        folder: gets the library and the object files.
        baseline_only: leave the kernels of the levels above out.

    Returns:
        The library's path.

    Raises:
        SanitizerMissing, ninja_build.BuildError: it cannot be compiled here.
    """
    ninja_build = load_build(sources or REPOSITORY / "csrc")
    tools = ninja_build.find_toolchain()
    _find(tools.cxx, _RUNTIME[kind])
    if baseline_only:
        ninja_build.LEVELS = {"baseline": ()}
    # Checked code that is inlined into one function per dtype takes minutes to compile: let the compiler choose.
    ninja_build._KERNEL_FLAGS = (
        *("-O1", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
        *("-Dflatten=unused", "-Dalways_inline=unused", "-w"),
    )
    extra = [*_FLAGS[kind], "-g1", "-fno-omit-frame-pointer"]
    if kind == "thread":
        threads = folder / "threads.o"
        folder.mkdir(parents=True, exist_ok=True)
        source = ninja_build.SOURCES / "sanitize/threads.cpp"
        flags = ["-std=c++17", "-fPIC", "-O1", "-pthread", *extra]
        subprocess.run([*tools.cxx, *flags, "-c", str(source), "-o", str(threads)], check=True)
        extra.append(f"-Wl,{threads}")
    library = folder / "cpu.abi3.so"
    ninja_build.build_cpu(tools, library, folder / "objects", extra=extra)
    return library


def missing(kind: str) -> str | None:
    """Why nothing can be compiled for this sanitizer here, or ``None``."""
    ninja_build = load_build()
    try:
        _find(ninja_build.find_toolchain().cxx, _RUNTIME[kind])
    except (SanitizerMissing, ninja_build.BuildError) as error:
        return str(error)
    return None


def _find(cxx: Sequence[str], file: str) -> str:
    """Where the compiler keeps one of its libraries."""
    found = subprocess.run([*cxx, f"-print-file-name={file}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        raise SanitizerMissing(f"{cxx[0]} has no {file}")
    return path


def run(
    kind: str, library: Path, command: Sequence[str], **options: object
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` (a Python program) on the library; what it returns and prints is the caller's to read."""
    cxx = load_build().find_toolchain().cxx
    environment: Mapping[str, str] = {
        **os.environ,
        **_OPTIONS[kind],
        # Exceptions are intercepted where the C++ runtime is loaded as early as the sanitizer.
        "LD_PRELOAD": f"{_find(cxx, _RUNTIME[kind])} {_find(cxx, 'libstdc++.so.6')}",
        "SHIFCON_NATIVE_LIBRARY": str(library),
        "SHIFCON_CONTRACT": "native",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "2" if kind == "address" else "1",
        "PYTHONMALLOC": "malloc",
    }
    # The thread sanitizer wants memory where it expects it, which random addresses do not give it.
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" else []
    return subprocess.run(
        [*fixed, *command], env=environment, text=True, cwd=REPOSITORY, check=False, **options
    )  # type: ignore[call-overload, no-any-return]


def main() -> int:
    """Build, run the tests at every level, and return 0 where nothing was reported."""
    own, given = sys.argv[1:], [*TESTS, "-k", SMALL]
    if "--" in own:
        own, given = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=sorted(_FLAGS))
    parser.add_argument("--baseline", action="store_true", help="leave the levels above the baseline out")
    arguments = parser.parse_args(own)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        library = build(arguments.kind, Path(folder), baseline_only=arguments.baseline)
        compiled = ["baseline"] if arguments.baseline else list(load_build().LEVELS)
        # The kernels of avx512, told that they may multiply bfloat16.
        chosen = [*compiled, *(["avx512_bf16"] if "avx512" in compiled else [])]
        for level in chosen:
            print(f"== {arguments.kind}, {level}", flush=True)
            os.environ["SHIFCON_CPU_LEVEL"] = level
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-s",
                "-p",
                "no:cacheprovider",
                "--timeout=0",
            ]
            failed |= run(arguments.kind, library, [*command, *given]).returncode != 0
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
