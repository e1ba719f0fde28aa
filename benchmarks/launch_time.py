#!/usr/bin/env python
"""What a launcher of the Triton kernels costs the host: with Triton's own launches, and with ``cached_launch``.

    OMP_NUM_THREADS=1 python -P benchmarks/launch_time.py --output launch_time.json

Needs Triton and no GPU: kernels are compiled for an H100, and a stand-in takes the place of its driver. So the
driver's own launch is missing, from both sides alike, and allocations are the CPU's. The sides take turns; a turn's
time is the least of ten; a row tells the median of the turns' ratios with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import stand_in_driver
from machine import machine
from shifcon_fast.kernels import (
    add_shift_rms_norm,
    contrastive_similarity,
    info_nce,
    launch,
    masked_mean_pool,
)


def launchers() -> dict[str, Callable[[], object]]:
    """Small calls, of one launch or two each."""
    x, weight, table = torch.randn(2, 4, 256), torch.rand(256), torch.randn(4, 256)
    index, mask, a = torch.tensor([1, -1]), torch.ones(2, 4, dtype=torch.bool), torch.randn(2, 16, 256)
    _, h, rstd = add_shift_rms_norm.forward(x, weight, x, table, index, 1e-6, "llama")
    pooled, factor = masked_mean_pool.forward(x, mask, True)
    return {
        "add_shift_rms_norm": lambda: add_shift_rms_norm.forward(x, weight, x, table, index, 1e-6, "llama"),
        "add_shift_rms_norm, backward": lambda: add_shift_rms_norm.backward(
            x, x, h, weight, rstd, index, 4, "llama", True, False, False
        ),
        "masked_mean_pool": lambda: masked_mean_pool.forward(x, mask, True),
        "masked_mean_pool, backward": lambda: masked_mean_pool.backward(
            pooled, pooled, factor, mask, x.dtype, True
        ),
        "info_nce": lambda: info_nce.forward(a, a, 20.0, True, False),
        "contrastive_similarity": lambda: contrastive_similarity.forward(a, a, 20.0, True, False),
    }


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Of one call: the least of ten times ``calls`` of them."""

    def several() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return 1e6 * min(several() for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()

    stand_in_driver.activate(("cuda", 90, 32))
    rows = []
    for name, call in launchers().items():
        taken: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(options.turns):
            for cached in (bool(turn % 2), not turn % 2):
                launch._caches = lambda _, cached=cached: cached
                call()
                taken[cached].append(microseconds(call, options.calls))
        ratios = [triton / ours for triton, ours in zip(taken[False], taken[True], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "launcher": name,
                "triton_us": round(min(taken[False]), 2),
                "ours_us": round(min(taken[True]), 2),
                "ratio": round(median, 2),
                "quartiles": [round(low, 2), round(high, 2)],
            }
        )
        print(json.dumps(rows[-1]))
    found = {
        "what": "host time of a launcher's small call without the driver's launch, Triton's launches / ours",
        **machine("cpu"),
        "triton": version("triton"),
        "rows": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
