"""Two processes against one on the same cores and the same global batch.

    python benchmarks/processes.py [--size smollm2] [--steps 5] [--rounds 2] [--out DIR]

A step is both losses, backward and AdamW of a randomly initialised model in NF4 with LoRA, on the CPU: one process
with two threads, and two processes (gloo, DDP) with one thread each, half of the rows each, negatives gathered.
They take turns. Loss and gradient norm of the first step are recorded with the times: they are the same. Writes
DIR/processes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "step")]


def measure(size: str, steps: int) -> dict[str, Any]:
    """The times of this process's steps; it is one of ``WORLD_SIZE``."""
    from model import build
    from shapes import SIZES
    from torch.nn.parallel import DistributedDataParallel
    from variants import W_GEN, W_MCL, make_batch, make_space

    import shifcon_fast as sf

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if count > 1:
        dist.init_process_group("gloo")
    shape, device = SIZES[size], torch.device("cpu")
    model: Any = build(shape, device)
    batch = make_batch(shape, device)
    rows = slice(rank * shape.generation[0] // count, (rank + 1) * shape.generation[0] // count)
    pairs = slice(rank * shape.pairs[0] // count, (rank + 1) * shape.pairs[0] // count)
    generation = batch.generation[rows]
    contrastive: Any = {
        name: torch.cat([half[pairs] for half in values.chunk(2)]) for name, values in batch.pairs.items()
    }
    handle = sf.attach(model, make_space(model), *shape.area)
    ids = torch.ones(len(generation), dtype=torch.long)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0)
    wrapped = DistributedDataParallel(model) if count > 1 else model

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = (
            W_GEN * wrapped(input_ids=generation, labels=generation, language_ids=ids, use_cache=False).loss
        )
        loss = loss + W_MCL * sf.mcl_loss(model, contrastive, handle, gather_across_devices=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    loss = step()
    norm = torch.stack([parameter.grad.norm() for parameter in trainable]).norm()
    if count > 1:
        dist.all_reduce(loss)
        loss /= count
    taken = []
    for _ in range(steps):
        if count > 1:
            dist.barrier()
        start = time.perf_counter()
        step()
        if count > 1:
            dist.barrier()
        taken.append(time.perf_counter() - start)
    return {"seconds": taken, "loss": loss.item(), "gradient_norm": norm.item()}


def run(size: str, steps: int, count: int, cores: int) -> dict[str, Any]:
    """What the first of ``count`` processes found."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": max(1, cores // count)}
        command = [sys.executable, "-P", __file__, "--one", "--size", size, "--steps", str(steps)]
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [each.communicate()[0] for each in running]
    if any(each.returncode for each in running):
        raise RuntimeError(f"{count} process(es) ended with {[each.returncode for each in running]}")
    record: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "processes")
    parser.add_argument("--size", default="smollm2", help="of benchmarks/step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.size, options.steps)))
        return
    from machine import machine

    taken: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for count, rows in taken.items():
            rows.append(run(options.size, options.steps, count, options.cores))
    medians = {
        count: statistics.median(seconds for row in rows for seconds in row["seconds"])
        for count, rows in taken.items()
    }
    record = {
        "machine": machine("cpu"),
        "size": options.size,
        "cores": options.cores,
        "one process": taken[1],
        "two processes": taken[2],
        "two processes / one": medians[2] / medians[1],
        "curves": {  # for growth_plot.py
            "processes": [
                {"at": count, "seconds": [seconds for row in rows for seconds in row["seconds"]]}
                for count, rows in taken.items()
            ]
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "processes.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(
        f"one process {medians[1]:.2f} s, two {medians[2]:.2f} s: {record['two processes / one']:.3f} x; losses "
        f"{taken[1][0]['loss']:.6f} and {taken[2][0]['loss']:.6f}"
    )


if __name__ == "__main__":
    main()
