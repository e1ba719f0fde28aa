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
BRIEFLY = ["plain QLoRA", "authors' recipe", "ours", "ours, transformers' norms"]


@pytest.mark.parametrize("size", ["smollm2", "gemma3", "llama-3-8b"])
def test_step(size: str, benchmark: Any, record: Any, device: torch.device, smoke: bool) -> None:
    if (size == "llama-3-8b") != (device.type == "cuda"):
        pytest.skip(f"not a size for {device.type}")
    shape = "tiny" if smoke else size
    # The larger shape takes four of the variants only, for the minutes that a run of all suites has.
    steps = 1 if smoke else 3 if size == "gemma3" else 5
    variants = BRIEFLY if size == "gemma3" and not smoke else list(VARIANTS.VARIANTS)
    checkpointing = device.type == "cuda"  # on the CPU's short batches all activations fit
    found = STEP.measure(
        shape,
        device,
        steps,
        variants,
        lambda _: None,
        checkpointing=checkpointing,
        profiles=False,
    )
    benchmark.pedantic(lambda: None, rounds=1)
    rows = found["variants"]
    losses = {name: row["loss"] for name, row in rows.items() if name in VARIANTS.SAME_LOSS}
    ours = losses["ours"]
    assert all(abs(loss - ours) <= 1e-2 * abs(ours) for loss in losses.values()), losses
    keep = ("size", "device", "area", "generation", "pairs", "checkpointing", "matmul_flop_s", "saved_ms")
    record(
        case=f"step {shape}",
        peer="ours",
        ms=rows["ours"]["ms"],
        variants=rows,
        norms=STEP.norms_interval(found),
        **{key: found[key] for key in keep},
    )
