"""How the cost of one step grows with languages, boundaries, pairs and length; ``growth_plot.py`` draws the record.

    python benchmarks/step/growth.py --size smollm2|gemma3|tiny --out results/growth/NAME.json [--steps 3]

One quantity grows while the others stay as the size has them. The points of a curve take turns. All activations are
kept. Sentences in several languages have a random vector each, and a row may be in any of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import machine
from model import build
from run import Runner
from shapes import SIZES, Size
from variants import make_batch, make_space


def points(size: Size, smoke: bool) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Curve → (where a point stands, what of the step is other there)."""
    first, last = size.area
    pairs, *lengths = size.pairs
    rows, length = size.generation
    width = last - first
    few = (1, 2) if smoke else (1, 2, 4)
    return {
        "languages": [(count, {"languages": count}) for count in ((1, 3) if smoke else (1, 4, 16))],
        "boundaries": [
            (each, {"area": (first, first + each)}) for each in sorted({1, -(-width // 2), width})
        ],
        "pairs": [(each * pairs, {"pairs": (each * pairs, *lengths)}) for each in few],
        "length": [(each * length // 2, {"generation": (rows, each * length // 2)}) for each in few],
    }


def measure(name: str, steps: int) -> dict[str, Any]:
    """The record that ``growth_plot.py`` draws."""
    device = torch.device("cpu")
    size = SIZES[name]
    runner = Runner(name, device, model=build(size, device, checkpointing=False))
    curves: dict[str, list[dict[str, Any]]] = {}
    for curve, changes in points(size, name == "tiny").items():
        steps_of: list[tuple[int, Size, int]] = []
        for at, change in changes:
            other = dict(change)
            languages = other.pop("languages", 1)
            steps_of.append((at, replace(size, **other), languages))
        found: dict[int, dict[str, Any]] = {at: {"at": at, "seconds": []} for at, _, _ in steps_of}
        for turn in range(steps + 1):
            for at, shape, languages in steps_of:
                runner.size = shape
                runner.batch = make_batch(shape, device, languages=languages)
                runner.space = make_space(runner.model, languages=languages + 1)
                if turn == 0:
                    found[at]["flops"] = runner.first("ours")["flops"]
                else:
                    found[at]["seconds"].append(runner.seconds("ours"))
        curves[curve] = list(found.values())
        print(curve, [(each["at"], min(each["seconds"])) for each in curves[curve]], flush=True)
    return {"machine": machine("cpu"), "size": name, "steps": steps, "curves": curves}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("smollm2", "gemma3", "tiny"), default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args(arguments)
    record = measure(options.size, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
