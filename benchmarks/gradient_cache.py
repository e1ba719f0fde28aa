"""More negatives in the same memory: time per pair and peak memory with gradient caching.

    python benchmarks/gradient_cache.py --out DIR [--size smollm2 --size gemma3] [--times 8] [--rounds 2]
        [--checkpointing] [--device cuda|cpu]

The contrastive loss alone, forward and backward, of a randomly initialised model in NF4 with LoRA: N pairs in one
pass, and ``--times`` as many in mini-batches of N. Every measurement is a process of its own, so that its peak is
its own; they take turns. On the CPU the peak is what the kernel counts (VmHWM, set back once the model is there);
on CUDA it is the allocator's. glibc is told to give blocks of 64 KiB back when they are freed: by itself it
moves that bound up to 32 MiB and keeps them in pieces. Writes DIR/gradient_cache.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
sys.path[:0] = [str(HERE), str(HERE / "step")]


def measure(size: str, times: int, device: torch.device, checkpointing: bool) -> dict[str, Any]:
    """One process's measurement: ``times`` times the pairs of a size, in as many passes."""
    from dataclasses import replace

    from model import build
    from shapes import SIZES
    from variants import make_batch, make_space

    import shifcon_fast as sf

    shape = SIZES[size]
    model = build(shape, device, checkpointing=checkpointing)
    count, *lengths = shape.pairs
    batches = {
        many: make_batch(replace(shape, pairs=(count * many, *lengths)), device).pairs for many in {1, times}
    }
    handle = sf.attach(model, make_space(model), *shape.area, recipe="official")

    def step(many: int) -> float:
        model.zero_grad(set_to_none=True)
        loss = sf.mcl_loss(model, batches[many], handle, mode="pooled", mini_batch_size=count)
        loss.backward()
        synchronize(device)
        return loss.item()

    step(1)  # warm up
    model.zero_grad(set_to_none=True)
    before = reset_peak(device)
    start, worked = time.perf_counter(), time.process_time()
    loss = step(times)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    return {
        "pairs": count * times,
        "mini_batch_size": count,
        "seconds": seconds,
        "processor_seconds": worked,  # of all threads: what a neighbour changes less
        "seconds_per_pair": seconds / (count * times),
        "before_mib": before,
        "peak_mib": peak(device),
        "loss": loss,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> float:
    """Forget the peak so far; what is held now, in MiB."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gradient_cache")
    parser.add_argument("--size", action="append", help="of benchmarks/step; repeat it")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="checkpoint the blocks too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.size or ["smollm2", "gemma3"]
    if options.one:
        found = measure(sizes[0], options.one, torch.device(options.device), options.checkpointing)
        print(json.dumps(found))
        return
    from machine import machine

    record: dict[str, Any] = {
        "machine": machine(options.device),
        "malloc": MALLOC,
        "checkpointing": options.checkpointing,
        "sizes": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        taken: dict[int, list[dict[str, Any]]] = {1: [], options.times: []}
        for _ in range(options.rounds):
            for many, rows in taken.items():
                command = [sys.executable, "-P", __file__, "--size", size, "--one", str(many)]
                command += ["--device", options.device, *(["--checkpointing"] * options.checkpointing)]
                found = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **MALLOC}
                ).stdout
                rows.append(json.loads(found.splitlines()[-1]))
        plain, cached = (
            {
                name: statistics.median(row[name] for row in taken[many])
                for name in ("seconds_per_pair", "peak_mib", "before_mib")
            }
            for many in taken
        )
        record["sizes"][size] = {
            "one pass": taken[1],
            "cached": taken[options.times],
            "time per pair, cached / one pass": cached["seconds_per_pair"] / plain["seconds_per_pair"],
            "peak, cached / one pass": cached["peak_mib"] / plain["peak_mib"],
        }
        name = "gradient_cache_checkpointing" if options.checkpointing else "gradient_cache"
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        row = record["sizes"][size]
        print(
            f"{size}: {options.times} x the pairs at {row['time per pair, cached / one pass']:.2f} x the time per "
            f"pair, {row['peak, cached / one pass']:.2f} x the memory"
        )


if __name__ == "__main__":
    main()
