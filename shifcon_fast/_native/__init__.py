"""The compiled libraries of csrc/, as far as this installation has them: ``cpu.abi3.so`` and ``cuda.abi3.so``.

They are loaded, once, when an operator or a report first asks; a library that is not there or does not load is a
reason, never an import error.

The environment variable SHIFCON_NATIVE_LIBRARY names a file that stands in for the installed library of the same
name: one that was built elsewhere, with sanitizers for example (``make sanitize``).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

LEVELS = ("baseline", "AVX2", "AVX-512")

_HOW_TO_BUILD = (
    "for it, reinstall where g++ and ninja are: "
    "pip install --no-build-isolation --force-reinstall --no-deps shifcon-fast"
)


def _file_of(library: str) -> Path | None:
    asked = Path(os.environ.get("SHIFCON_NATIVE_LIBRARY", ""))
    if asked.name.startswith(f"{library}."):
        return asked
    return next(iter(sorted(Path(__file__).parent.glob(f"{library}.*so"))), None)


@cache
def load(library: str) -> str | None:
    """Load ``library`` ("cpu" or "cuda"); return why it cannot be used, or ``None`` when it can."""
    found = _file_of(library)
    if found is None:
        return f"it was installed without the compiled extension ({library}); {_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(found))
    except (OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0]
        return (
            f"the compiled extension ({library}) does not load into torch {torch.__version__} ({cause}); it needs "
            f"the stable ABI of torch >= 2.10; {_HOW_TO_BUILD}"
        )
    return None


def cpu_level() -> str | None:
    """The vector instructions that the CPU kernels use here; ``None`` without the CPU library."""
    return None if load("cpu") is not None else LEVELS[torch.ops.shifcon_fast_cpu.level()]
