"""The compiled libraries of csrc/, as far as this installation has them: ``cpu.abi3.so`` and ``cuda.abi3.so``.

They are loaded, once, when an operator or a report first asks; a library that is not there or does not load is a
reason, never an import error.

The environment variable SHIFCON_NATIVE_LIBRARY names a file that stands in for the installed library of the same
name: one that was built elsewhere, with sanitizers for example (``make sanitize``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

# What SHIFCON_CPU_LEVEL may ask for, and what it is called; in the order of csrc/cpu/levels.h.
LEVELS = {
    "baseline": "baseline",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512 with BF16",
}

_HOW_TO_BUILD = {
    "cpu": "for it, where g++, ninja and setuptools >= 77 are, run `pip install --no-build-isolation --no-deps "
    "--force-reinstall .` in the folder of the source",
    "cuda": "for it, where nvcc, g++, ninja and setuptools >= 77 are, run `SHIFCON_CUDA=1 pip install "
    "--no-build-isolation --no-deps --force-reinstall .` in the folder of the source",
}


def _file_of(library: str) -> Path | None:
    asked = Path(os.environ.get("SHIFCON_NATIVE_LIBRARY", ""))
    if asked.name.startswith(f"{library}."):
        return asked
    return next(iter(sorted(Path(__file__).parent.glob(f"{library}.*so"))), None)


def _another_copy(library: str, file: Path) -> bool:
    """Whether a different file has registered these operators; a second one would abort the process."""
    if str(file.resolve()) in torch.ops.loaded_libraries:
        return False
    names = torch._C._dispatch_get_all_op_names()
    return any(name.startswith(f"shifcon_fast_{library}::") for name in names)


@cache
def load(library: str) -> str | None:
    """Load ``library`` ("cpu" or "cuda"); return why it cannot be used, or ``None`` when it can."""
    if library == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA; install a torch that is"
    level = os.environ.get("SHIFCON_CPU_LEVEL") or "baseline"
    if library == "cpu" and level not in LEVELS:
        return f"SHIFCON_CPU_LEVEL: got {level!r}; wanted one of {', '.join(LEVELS)}, or no such variable"
    cache = os.environ.get("SHIFCON_CACHE_BYTES") or None
    if library == "cpu" and cache is not None and not (cache.isdecimal() and int(cache) > 0):
        return f"SHIFCON_CACHE_BYTES: got {cache!r}; wanted a whole number of bytes > 0, or no such variable"
    found = _file_of(library)
    if found is None:
        return f"it was installed without the compiled extension ({library}); {_HOW_TO_BUILD[library]}"
    if _another_copy(library, found):
        return (
            f"another copy of the compiled extension ({library}) than {found} is loaded in this process; import "
            "shifcon_fast from one installation only"
        )
    try:
        torch.ops.load_library(str(found))
    except (OSError, RuntimeError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]  # torch wraps what the system says
        return (
            f"the compiled extension ({library}) does not load into torch {torch.__version__} on this machine: "
            f"{cause}. It needs torch >= 2.10, and a system as new as the one that compiled it; "
            f"{_HOW_TO_BUILD[library]}"
        )
    return None


@cache
def operator(library: str, name: str) -> Callable[..., Any]:
    """What calls an operator of a loaded library; asking ``torch.ops`` at every call costs a microsecond."""
    overload = getattr(getattr(torch.ops, f"shifcon_fast_{library}"), name).default
    called: Callable[..., Any] = getattr(overload, "_op", overload)  # without a Python frame in between
    return called


def cpu_level() -> str | None:
    """The vector instructions that the CPU kernels use here; ``None`` without the CPU library."""
    return None if load("cpu") is not None else list(LEVELS.values())[torch.ops.shifcon_fast_cpu.level()]
