"""What ``torch.compile`` is worth to the generation pass of an attached model, forward and backward.

    python benchmarks/compiled.py --out DIR [--size smollm2] [--rounds 5] [--device cuda|cpu]

A randomly initialised model in NF4 with LoRA and gradient checkpointing, eager and compiled (inductor) in turns, on
the same batch. Writes DIR/compiled.json: seconds of each, their losses, and how long compiling took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "step")]


def measure(size: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Times of one size."""
    from model import build
    from shapes import SIZES
    from variants import make_space

    import shifcon_fast as sf
    from shifcon_fast.training.compiling import compilable

    shape = SIZES[size]
    model = build(shape, device)
    sf.attach(model, make_space(model), *shape.area)
    ids = torch.randint(3, shape.config["vocab_size"], shape.generation, device=device)
    languages = torch.arange(len(ids), device=device) % 2
    batch = {"input_ids": ids, "labels": ids, "language_ids": languages, "use_cache": False}
    calls = {"eager": model, "compiled": torch.compile(model)}

    def step(call: Any) -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = call(**batch).loss
        loss.backward()
        value = loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, value

    with compilable(model):
        first = {name: step(call)[0] for name, call in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        losses = {}
        for _ in range(rounds):
            for name, call in calls.items():
                elapsed, losses[name] = step(call)
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "size": size,
        "generation": shape.generation,
        "seconds": seconds,
        "losses": losses,
        "first_step_seconds": first,
        "eager_over_compiled": medians["eager"] / medians["compiled"],
    }


def main() -> None:
    """Measure and write."""
    from machine import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    found = measure(arguments.size, arguments.rounds, torch.device(arguments.device))
    found["machine"] = machine(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "compiled.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: found[key] for key in ("eager_over_compiled", "losses", "first_step_seconds")}))


if __name__ == "__main__":
    main()
