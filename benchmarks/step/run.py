"""Time, memory and whereabouts of one real training step: plain QLoRA, the authors' recipe, ours, and ablations.

    python benchmarks/step/run.py --out DIR --size llama-3-8b|1b|smollm2|gemma3|tiny [--device cuda|cpu]
        [--steps 5] [--variant NAME]... [--no-checkpointing]

A randomly initialised model in NF4 with LoRA on every linear layer; a step is forward, backward and the AdamW
update of the adapters, under gradient checkpointing or without. The learning rate is 0: the update does its work,
and every variant meets the same weights. The variants take turns, so that a drifting clock meets them alike; each
figure is the median with the distance between the quartiles. TFLOP/s count the matrix products that ran,
recomputation included. Writes DIR/step.json anew whenever more is known, the profiles last; a variant that runs out
of memory is recorded so. On the CPU the peak memory is that of a process of its own, above what its imports take
(``memory.py``). The matrix product's rate is taken from DIR/ceilings.json where that is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ceilings
from machine import machine
from model import build
from products import other_products
from shapes import SIZES
from timing import Timing
from variants import VARIANTS, Batch, make_batch, make_space

TOP_KERNELS = 25
WITH_MEMORY = ("plain QLoRA", "authors' recipe", "ours", "ours, all logits and one backward")
"""Variants whose peak memory is taken on the CPU, which takes a process each."""


class Runner:
    """Takes steps of one model, and measures them."""

    def __init__(
        self, size: str, device: torch.device, *, checkpointing: bool = True, model: Any = None
    ) -> None:
        self.size, self.device = SIZES[size], device
        self.model = build(self.size, device, checkpointing=checkpointing) if model is None else model
        self.batch: Batch = make_batch(self.size, device)
        self.space = make_space(self.model)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)

    def with_step(self, variant: str, use: Callable[[Callable[[], torch.Tensor]], Any]) -> Any:
        """``use(step)`` inside of the variant's context; ``step()`` returns the loss."""
        prepared = VARIANTS[variant](self.model, self.batch, self.size.area, self.space)

        def step() -> torch.Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = compute()
            loss.backward()
            self.optimizer.step()
            return loss.detach()

        with prepared as compute:
            return use(step)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def first(self, variant: str) -> dict[str, Any]:
        """Warm up; loss, peak memory and operations of a step."""

        def use(step: Callable[[], torch.Tensor]) -> dict[str, Any]:
            step()
            peak = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            loss = float(step())
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**20
            norm = torch.stack(
                [p.grad.norm() for g in self.optimizer.param_groups for p in g["params"]]
            ).norm()
            with FlopCounterMode(display=False, custom_mapping=other_products()) as counted:
                step()
            return {
                "loss": loss,
                "gradient_norm": float(norm),
                "peak_mib": peak,
                "flops": counted.get_total_flops(),
            }

        return self.with_step(variant, use)

    def seconds(self, variant: str) -> float:
        def use(step: Callable[[], torch.Tensor]) -> float:
            self.synchronize()
            if self.device.type != "cuda":
                start = time.perf_counter()
                step()
                return time.perf_counter() - start
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return self.with_step(variant, use)

    def kernels(self, variant: str) -> list[dict[str, Any]]:
        """Where the time of one step goes: the kernels (on the CPU, operators) that take most of it."""
        cuda = self.device.type == "cuda"

        def use(step: Callable[[], torch.Tensor]) -> list[dict[str, Any]]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            with profile(activities=activities) as record:
                step()
                self.synchronize()
            rows = [
                (event.key, event.count, event.self_device_time_total if cuda else event.self_cpu_time_total)
                for event in record.key_averages()
                # On CUDA an operator's row repeats what its kernels took.
                if not cuda or event.device_type == torch.autograd.DeviceType.CUDA
            ]
            total = sum(microseconds for _, _, microseconds in rows)
            rows.sort(key=lambda row: -row[2])
            return [
                {"name": name, "calls": calls, "ms": us / 1e3, "percent": 100 * us / total}
                for name, calls, us in rows[:TOP_KERNELS]
            ]

        return self.with_step(variant, use)


def measure(
    size: str,
    device: torch.device,
    steps: int,
    variants: Sequence[str],
    write: Callable[[dict[str, Any]], None],
    *,
    checkpointing: bool = True,
    profiles: bool = True,
) -> dict[str, Any]:
    """Everything that step.json holds; ``write`` gets it whenever there is more of it."""
    shape = SIZES[size]
    found: dict[str, dict[str, Any]] = {}
    multiplied = product_rate(device, size == "tiny")
    record = {
        "size": size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "area": shape.area,
        "generation": shape.generation,
        "pairs": shape.pairs,
        "checkpointing": checkpointing,
        "machine": machine(str(device)),
        "matmul_flop_s": multiplied,
        "variants": found,
        "saved_ms": {},
    }
    runner = Runner(size, device, checkpointing=checkpointing)
    for variant in variants:
        try:
            found[variant] = runner.first(variant)
            if device.type == "cpu" and variant in WITH_MEMORY and size != "tiny":
                found[variant]["peak_mib"] = peak_of_a_process(size, variant, checkpointing)
        except torch.cuda.OutOfMemoryError as error:
            found[variant] = {"error": str(error).splitlines()[0]}
            runner.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        write(record)
    usable = [variant for variant in variants if "error" not in found[variant]]
    taken: dict[str, list[float]] = {variant: [] for variant in usable}
    for _ in range(steps):
        for variant in usable:
            taken[variant].append(runner.seconds(variant))
            timing, flops = Timing.of(taken[variant]), found[variant]["flops"]
            found[variant].update(
                ms=timing.median * 1e3,
                iqr_ms=timing.iqr * 1e3,
                steps=timing.rounds,
                seconds=taken[variant],
                tflop_s=flops / timing.median / 1e12,
                percent_of_matmul=100 * flops / timing.median / multiplied,
            )
        record["saved_ms"] = contributions(found)
        write(record)
    for variant in usable if profiles else ():
        found[variant]["kernels"] = runner.kernels(variant)
        write(record)
    return record


def norms_interval(record: dict[str, Any]) -> tuple[float, float, float] | None:
    """Ours over ours with transformers' norms, turn by turn: lower quartile, median, upper quartile."""
    rows = [record["variants"].get(name, {}).get("seconds") for name in ("ours", "ours, transformers' norms")]
    if not all(rows) or len(rows[0]) < 2:
        return None
    ratios = [ours / theirs for ours, theirs in zip(*rows, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return lower, middle, upper


def peak_of_a_process(size: str, variant: str, checkpointing: bool) -> float:
    """MiB, of a process of its own; memory goes back to the system as soon as it is freed there."""
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), size, variant]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(
        [*command, *(["--checkpointing"] if checkpointing else [])],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(result.stdout.split()[-1])


def product_rate(device: torch.device, small: bool) -> float:
    """Operations per second of a product in the step's dtype; on CUDA on a stream of its own, for the graph."""
    if device.type != "cuda":
        return ceilings.matmul_rate("cpu", "float32", small)
    with torch.cuda.stream(torch.cuda.Stream()):
        return ceilings.matmul_rate("cuda", "bfloat16", small)


def contributions(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many milliseconds each part of ours saves: the step without it minus the step with it."""
    parts = {
        "fused norms": "ours, transformers' norms",
        "cut contrastive pass": "ours, contrastive pass not cut",
        "rows without padding": "ours, sentences padded",
        "no logits, and the contrastive loss first": "ours, all logits and one backward",
        "everything, against the authors' recipe": "authors' recipe",
    }
    ours = found.get("ours", {}).get("ms")
    return {
        part: found[without]["ms"] - ours
        for part, without in parts.items()
        if ours is not None and "ms" in found.get(without, {})
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="llama-3-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=ceilings.default_device())
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="one of those to time; repeat it"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    measured_before = options.out / "ceilings.json"
    if measured_before.exists() and options.device == "cuda":
        ceilings.read(measured_before)

    def write(record: dict[str, Any]) -> None:
        (options.out / "step.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    record = measure(
        options.size,
        torch.device(options.device),
        options.steps,
        options.variant or list(VARIANTS),
        write,
        checkpointing=not options.no_checkpointing,
    )
    for name, row in record["variants"].items():
        memory = f"{row['peak_mib']:9.0f} MiB" if row.get("peak_mib") is not None else ""
        time_ = f"{row['ms']:9.1f} ms ± {row['iqr_ms'] / 2:.1f}" if "ms" in row else row["error"]
        print(f"{name:32s} {time_} {memory} loss {row.get('loss', float('nan')):.4f}")
    for part, saved in record["saved_ms"].items():
        print(f"{part}: {saved:+.1f} ms saved")
    if (norms := norms_interval(record)) is not None:
        lower, middle, upper = norms
        print(f"ours / ours with transformers' norms: {middle:.3f} ({lower:.3f}-{upper:.3f})")


if __name__ == "__main__":
    main()
