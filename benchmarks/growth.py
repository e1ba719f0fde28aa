"""How a step's cost grows with the work: languages, boundaries, pairs, length of an instruction.

    python benchmarks/growth.py [--size smollm2] [--rounds 3] [--curve NAME]... [--out FILE]

Our step of ``benchmarks/step`` (both losses, backward, AdamW), one quantity at a time below and above what the
recipe of that size has. The points take turns, so that a busy neighbour meets all alike. Matrix products are
counted once per point. ``growth_plot.py`` draws the record, together with that of ``processes.py``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "step"), str(HERE)]
STEP = importlib.import_module("run")
MODEL = importlib.import_module("model")
VARIANTS = importlib.import_module("variants")
machine = importlib.import_module("machine").machine

FACTORS = (0.5, 1, 2, 4)


class Point:
    """One amount of work: a batch, an area and a space."""

    def __init__(self, at: int, size: Any, model: Any, device: torch.device, languages: int = 1) -> None:
        self.at, self.area = at, size.area
        self.batch = VARIANTS.make_batch(size, device)
        self.space = _space(model, languages)
        ids = self.batch.pairs["language_ids"]
        own = torch.arange(len(ids), device=device) % languages + 1
        self.batch.pairs["language_ids"] = torch.where(ids == 0, ids, own)
        self.seconds: list[float] = []
        self.flops = 0

    def about(self) -> dict[str, Any]:
        return {"at": self.at, "seconds": self.seconds, "flops": self.flops}


def _space(model: Any, languages: int) -> Any:
    """A language space of the pivot and so many others, random."""
    space = VARIANTS.make_space(model)
    names = (space.pivot, *(f"l{number}" for number in range(languages)))
    boundaries, _, hidden = space.mean.shape
    return replace(
        space,
        languages=names,
        mean=0.02 * torch.randn(boundaries, len(names), hidden, generator=torch.Generator().manual_seed(2)),
        counts=dict.fromkeys(names, 2),
        median_norm=torch.ones(boundaries, len(names)),
        sink_share=torch.zeros(boundaries, len(names)),
    )


def points(size: Any, model: Any, device: torch.device) -> dict[str, list[Point]]:
    """The points of every curve."""
    rows, length = size.generation
    count, *lengths = size.pairs
    first, blocks = size.area[0], size.config["num_hidden_layers"]
    widths = sorted({max(1, round((blocks - 1 - first) * share)) for share in (0.05, 0.25, 0.5, 1)})
    found = {
        "languages": [
            Point(number, size, model, device, number)
            for number in sorted({max(1, round(count * share)) for share in (0.125, 0.25, 0.5, 1)})
        ],
        "boundaries": [(width, replace(size, area=(first, first + width))) for width in widths],
        "pairs": [
            (many, replace(size, pairs=(many, *lengths)))
            for many in (max(2, round(count * f)) for f in FACTORS)
        ],
        "length": [
            (tokens, replace(size, generation=(rows, tokens)))
            for tokens in (round(length * f) for f in FACTORS)
        ],
    }
    return {
        name: [each if isinstance(each, Point) else Point(each[0], each[1], model, device) for each in curve]
        for name, curve in found.items()
    }


def measure(size: str, device: torch.device, rounds: int, curves: list[str] | None = None) -> dict[str, Any]:
    """The record: ``rounds`` times of every point, in turns."""
    runner = STEP.Runner(size, device)
    found = points(runner.size, runner.model, device)
    found = {name: curve for name, curve in found.items() if curves is None or name in curves}
    every = [point for curve in found.values() for point in curve]
    for number in range(rounds + 1):
        for point in every:
            prepared = VARIANTS.VARIANTS["ours"](runner.model, point.batch, point.area, point.space)
            with prepared as loss:

                def step(loss: Any = loss) -> None:
                    runner.optimizer.zero_grad(set_to_none=True)
                    loss().backward()
                    runner.optimizer.step()
                    runner.synchronize()

                if number == 0:  # warms up, and counts
                    counter = FlopCounterMode(display=False, custom_mapping=STEP._quantised_products())
                    with counter:
                        step()
                    point.flops = counter.get_total_flops()
                    continue
                start = time.perf_counter()
                step()
                point.seconds.append(time.perf_counter() - start)
    return {
        "machine": machine(device.type),
        "threads": torch.get_num_threads(),
        "size": size,
        "curves": {name: [point.about() for point in curve] for name, curve in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=MODEL.SIZES, default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve", action="append", choices=("languages", "boundaries", "pairs", "length"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="results/growth/SIZE.json if not given")
    options = parser.parse_args()
    out = options.out or HERE / "results" / "growth" / f"{options.size}.json"
    record = measure(options.size, torch.device(options.device), options.rounds, options.curve)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, curve in record["curves"].items():
        told = ", ".join(f"{point['at']}: {min(point['seconds']):.2f} s" for point in curve)
        print(f"{name}: {told}")


if __name__ == "__main__":
    main()
