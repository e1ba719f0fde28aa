"""What the loss costs from hidden states on: python -P benchmarks/chunked_loss.py --out FILE

The LM head and its loss, forward and backward, of the shapes of SmolLM2-135M and Gemma-3-270M with random weights:
512 tokens, of which a quarter or all are learnt, in four languages. Three ways:

* ``all logits``: the head on every token, and cross entropy of the logits in float32, as transformers has it.
* ``learnt logits``: the same for the learnt tokens alone.
* ``chunked``: ``shifcon_fast.training.losses.chunked_cross_entropy``, with the sums of each language.

Times are medians in turns, in one process for each shape. Memory is what the peak of the process's resident set
grows by in one forward and backward, in a process for each way. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from machine import machine

from shifcon_fast.training.losses.chunked_cross_entropy import chunked_cross_entropy, way

SHAPES = {"SmolLM2-135M": (49152, 576), "Gemma-3-270M": (262144, 640)}
TOKENS, LANGUAGES = 512, 4
WAYS = ("all logits", "learnt logits", "chunked")


def prepare(shape: str, dtype: str, learnt: int) -> tuple[Any, dict[str, Callable[[], float]]]:
    """The head, and for each way a forward and backward that returns the loss."""
    torch.manual_seed(0)
    vocabulary, width = SHAPES[shape]
    head = nn.Linear(width, vocabulary, bias=False, dtype=getattr(torch, dtype)).requires_grad_(False)
    hidden = torch.randn(TOKENS, width, dtype=head.weight.dtype)
    labels = torch.randint(0, vocabulary, (TOKENS,))
    labels[torch.randperm(TOKENS)[learnt:]] = -100
    kept = labels != -100
    languages = (torch.arange(TOKENS) * LANGUAGES // TOKENS)[kept]

    def run(loss: Callable[[Tensor], Tensor]) -> float:
        leaf = hidden.clone().requires_grad_()
        value = loss(leaf) / learnt
        value.backward()
        return value.item()

    def of_logits(leaf: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(head(leaf).float(), labels, reduction="sum")

    return head, {
        "all logits": lambda: run(lambda leaf: of_logits(leaf, labels)),
        "learnt logits": lambda: run(lambda leaf: of_logits(leaf[kept], labels[kept])),
        "chunked": lambda: run(lambda h: chunked_cross_entropy(head, h[kept], labels[kept], languages).total),
    }


def seconds(shape: str, dtype: str, learnt: int, repeats: int) -> dict[str, Any]:
    head, ways = prepare(shape, dtype, learnt)
    losses = {name: run() for name, run in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(round(time.perf_counter() - start, 4))
    return {
        "plain head goes by": way(head, torch.zeros(1, head.in_features, dtype=head.weight.dtype)),
        "loss": losses,
        "seconds": times,
        "median": {name: statistics.median(each) for name, each in times.items()},
    }


def mebibytes(shape: str, dtype: str, learnt: int, name: str) -> int:
    _, ways = prepare(shape, dtype, learnt)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    before = pages * resource.getpagesize()
    ways[name]()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    options = parser.parse_args()
    record: dict[str, Any] = {
        **machine("cpu"),
        "threads": torch.get_num_threads(),
        "tokens": TOKENS,
        "languages": LANGUAGES,
        "cases": [],
    }
    for shape in options.shape or SHAPES:
        for dtype in options.dtype or ("float32", "bfloat16"):
            for learnt in (TOKENS // 4, TOKENS):
                case = shape, dtype, learnt
                with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                    found = pool.apply(seconds, (*case, options.repeats))
                    found["peak_mib"] = {name: pool.apply(mebibytes, (*case, name)) for name in WAYS}
                record["cases"].append({"shape": shape, "dtype": dtype, "learnt": learnt, **found})
                told = (
                    f"{name} {found['median'][name]:.2f} s {found['peak_mib'][name]} MiB" for name in WAYS
                )
                print(*case, *told, sep="; ", flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
