"""Peak memory of one step on the CPU, in a process of its own: MiB above what the imports take.

    python benchmarks/step/memory.py SIZE VARIANT [--checkpointing]

The kernel's high-water mark of resident memory, set back before the step; a step before it warms up. ``run.py``
has glibc give freed memory back, so that what was freed does not count.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bitsandbytes  # noqa: F401 - before the baseline, as all imports
import peft  # noqa: F401
import torch
from run import Runner


def resident(field: str) -> float:
    """MiB: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def main() -> None:
    size, variant = sys.argv[1:3]
    before = resident("VmRSS")
    runner = Runner(size, torch.device("cpu"), checkpointing="--checkpointing" in sys.argv)

    def measure(step: object) -> float:
        assert callable(step)
        step()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        step()
        return resident("VmHWM") - before

    print(runner.with_step(variant, measure))


if __name__ == "__main__":
    main()
