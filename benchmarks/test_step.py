"""One training step of every variant of ``benchmarks/step``, in turns; the authors' step is the opponent."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")
sys.path.insert(0, str(Path(__file__).resolve().parent / "step"))
STEP = importlib.import_module("run")
VARIANTS = importlib.import_module("variants")


@pytest.mark.parametrize("size", ["smollm2", "gemma3", "llama-3-8b"])
def test_step(size: str, benchmark: Any, record: Any, device: torch.device, smoke: bool) -> None:
    if (size == "llama-3-8b") != (device.type == "cuda"):
        pytest.skip(f"not a size for {device.type}")
    shape = "tiny" if smoke else size
    steps = 1 if smoke else 3
    found = STEP.measure(shape, device, steps, list(VARIANTS.VARIANTS), lambda _: None)
    benchmark.pedantic(lambda: None, rounds=1)
    variants = {
        name: {key: value for key, value in row.items() if key != "kernels"}
        for name, row in found["variants"].items()
    }
    losses = {name: variants[name]["loss"] for name in VARIANTS.SAME_LOSS}
    ours = losses["ours"]
    assert all(abs(loss - ours) <= 1e-2 * abs(ours) for loss in losses.values()), losses
    keep = ("size", "device", "area", "generation", "pairs", "matmul_flop_s", "saved_ms")
    record(
        case=f"step {shape}",
        peer="ours",
        ms=variants["ours"]["ms"],
        variants=variants,
        **{key: found[key] for key in keep},
    )
