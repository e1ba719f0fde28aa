"""What the device can do at best: bandwidth of a copy, rate of a matrix product. Every figure is a share of one.

    python benchmarks/ceilings.py ceilings.json [--smoke]

Measured, not taken from a data sheet: a copy of 1 GiB on CUDA (256 MiB on the CPU; bytes read plus bytes written),
and square products of dense random matrices, 8,192 wide on CUDA (1,024 on the CPU), 2 n³ operations each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timing import ROUNDS, Call, Timing, time_host, time_in_graph, use_one_stream

DTYPES = ("bfloat16", "float32")
_read: dict[str, Any] | None = None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def read(file: Path) -> None:
    """Take the ceilings from what another process of this run wrote, instead of measuring them again."""
    global _read  # noqa: PLW0603 - one set of ceilings a process
    _read = json.loads(file.read_text(encoding="utf-8"))


def _time(calls: Sequence[Call], device: str) -> Timing:
    if device == "cuda":
        return time_in_graph(calls)
    # Products in a dtype that the processor emulates take seconds.
    once = time_host(calls, rounds=1, warmup=1).median
    return time_host(calls, rounds=max(3, min(ROUNDS, int(10 / once))), warmup=1)


@cache
def copy_bandwidth(device: str, smoke: bool = False) -> float:
    """Bytes per second, read plus written."""
    if _read is not None:
        return float(_read["copy_bytes_s"])
    count = 2**20 if smoke else 2**28 if device == "cuda" else 2**26
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _time([lambda: target.copy_(source)], device).median


@cache
def matmul_rate(device: str, dtype: str, smoke: bool = False) -> float:
    """Operations per second of a square product in ``dtype``."""
    if _read is not None:
        return float(_read["matmul_flop_s"][dtype])
    width = 128 if smoke else 8192 if device == "cuda" else 1024
    a, b = (torch.randn(width, width, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * width**3 / _time([lambda: a @ b], device).median


def measured(device: str, smoke: bool = False) -> dict[str, Any]:
    """All ceilings of the device, in bytes and operations per second, as ``ceilings.json`` holds them."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "copy_bytes_s": copy_bandwidth(device, smoke),
        "matmul_flop_s": {dtype: matmul_rate(device, dtype, smoke) for dtype in DTYPES},
    }


if __name__ == "__main__":
    if default_device() == "cuda":
        use_one_stream()
    found = measured(default_device(), "--smoke" in sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
