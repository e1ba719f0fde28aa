"""Seconds a step of the demo's pretraining takes, by threads and with other programs that keep cores busy.

    python benchmarks/neighbour.py [--steps 20]

Run it on a machine that does nothing else. The neighbours are processes that compute without end.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STEPS = """
import sys, time, torch
from shifcon_fast.demo import pretrain as p
from shifcon_fast.demo.settings import DemoSettings
from shifcon_fast.demo.tokenizer import build_tokenizer
from shifcon_fast.demo.world import build_world

class Bar:  # stands in for tqdm: notes when each step has ended
    times = []
    def __init__(self, **settings): self.times.append(time.perf_counter())
    def __enter__(self): return self
    def __exit__(self, *error): return None
    def set_postfix(self, **values): pass
    def update(self):
        self.times.append(time.perf_counter())
        if len(self.times) > int(sys.argv[1]) + 2:
            steps = [b - a for a, b in zip(self.times[2:], self.times[3:])]  # the first two warm up
            print(*steps)
            sys.exit()

p.tqdm = Bar
settings = DemoSettings()
p.train(build_world(settings.world).corpus, build_tokenizer(), settings.pretrain)
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """That many processes, each of which wants a core."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="One step of the demo's pretraining beside busy programs.")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    print(
        f"{names[0]}, {len(names)} cores, {platform.platform()}, load {os.getloadavg()[0]:.1f} at the start"
    )
    print("threads  busy neighbours  seconds a step: median, slowest")
    for threads in (1, len(names)):
        for count in (0, 1, 2):
            with neighbours(count):
                time.sleep(1)
                result = subprocess.run(
                    [sys.executable, "-c", STEPS, str(arguments.steps)],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    capture_output=True,
                    text=True,
                    check=True,
                )
            steps = [float(word) for word in result.stdout.split()]
            print(
                f"{threads:7}  {count:15}  {statistics.median(steps):.3f}, {max(steps):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
