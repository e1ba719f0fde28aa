"""The benchmark of one training step runs, here with a tiny model on the CPU, and compares what is comparable."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow("runs a benchmark")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "step" / "run.py"
SAME_LOSS = (
    "authors' recipe",
    "ours",
    "ours, transformers' norms",
    "ours, sentences padded",
    "ours, all logits and one backward",
    "ours, contrastive pass not cut",
)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("step")
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--size", "tiny", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--steps", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "authors' recipe" in result.stdout
    return json.loads((folder / "step.json").read_text(encoding="utf-8"))


def test_every_variant_was_timed_and_profiled(record: dict[str, Any]) -> None:
    assert record["variants"].keys() == {"plain QLoRA", *SAME_LOSS}
    for name, row in record["variants"].items():
        assert row["steps"] == 2, name
        assert 0 < row["ms"] < math.inf, name
        assert row["tflop_s"] * 1e12 == pytest.approx(row["flops"] / row["ms"] * 1e3)
        assert row["percent_of_matmul"] == pytest.approx(100e12 * row["tflop_s"] / record["matmul_flop_s"])
        assert sum(kernel["percent"] for kernel in row["kernels"]) <= 100.001
        assert row["kernels"] == sorted(row["kernels"], key=lambda kernel: -kernel["ms"])


def test_the_authors_recipe_and_ours_compute_the_same_step(record: dict[str, Any]) -> None:
    """Or the comparison would be one of different things: the loss and the gradients are equal up to rounding."""
    rows = [record["variants"][name] for name in SAME_LOSS]
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=1e-3)
    plain = record["variants"]["plain QLoRA"]
    assert plain["gradient_norm"] != pytest.approx(rows[0]["gradient_norm"], rel=0.05)


def test_operations_are_counted(record: dict[str, Any]) -> None:
    """The plain step by hand: forward, its recomputation, and backward to the inputs, of weights and adapters."""
    rows, length = record["generation"]
    layers = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    weights, adapters = sum(a * b for a, b in layers), sum(16 * (a + b) for a, b in layers)
    products = 4 * (3 * weights + 4 * adapters) + 2 * 64 * 128
    expected = 2 * rows * length * products
    # The rest: attention's products, what checkpointing need not recompute, what a first layer need not pass on.
    assert record["variants"]["plain QLoRA"]["flops"] == pytest.approx(expected, rel=0.15)
    flops = {name: record["variants"][name]["flops"] for name in SAME_LOSS}
    assert flops["ours"] < flops["ours, contrastive pass not cut"]
    assert flops["ours"] == flops["ours, transformers' norms"]
    assert flops["ours"] < flops["ours, sentences padded"]


def test_products_of_a_loss_from_hidden_states_are_counted() -> None:
    """One with the head and, where the gradients of hidden states or head are wanted, one for each."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch < 2.13 has no such loss")
    spec = importlib.util.spec_from_file_location("products", SCRIPT.with_name("products.py"))
    assert spec is not None
    assert spec.loader is not None
    products = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(products)
    targets = torch.randint(32, (10,))
    for wanted in ((False, False), (True, False), (True, True)):
        hidden, weight = (
            torch.randn(size).requires_grad_(needed)
            for size, needed in zip(((10, 8), (32, 8)), wanted, strict=True)
        )
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
        with FlopCounterMode(display=False, custom_mapping=products.other_products()) as counted:
            loss = functional.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
            if any(wanted):
                loss.backward()
        assert counted.get_total_flops() == (1 + sum(wanted)) * 2 * 10 * 8 * 32, wanted


def test_contributions_are_differences(record: dict[str, Any]) -> None:
    variants = record["variants"]
    assert record["saved_ms"] == {
        "fused norms": variants["ours, transformers' norms"]["ms"] - variants["ours"]["ms"],
        "cut contrastive pass": variants["ours, contrastive pass not cut"]["ms"] - variants["ours"]["ms"],
        "rows without padding": variants["ours, sentences padded"]["ms"] - variants["ours"]["ms"],
        "no logits, and the contrastive loss first": (
            variants["ours, all logits and one backward"]["ms"] - variants["ours"]["ms"]
        ),
        "everything, against the authors' recipe": variants["authors' recipe"]["ms"] - variants["ours"]["ms"],
    }
