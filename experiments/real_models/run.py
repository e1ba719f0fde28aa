#!/usr/bin/env python
"""Run what the experiment lacks, run by run; stopped at any time, it goes on where it was.

    make experiment                                              # everything that has no result file yet
    python experiments/real_models/run.py --models gemma-3-270m --arms plain,shifcon --seeds 1,2
    python experiments/real_models/run.py --search                # the search's, on dev territories
    python experiments/real_models/run.py --list                 # what there is, and what is missing

Each run is a process of its own with one thread (``--jobs`` of them side by side), and writes
``results/MODEL/ARM-SEED.json`` when it is done. A run that fails is told at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from arms import BASE, MODELS, runs, search_runs
from stored import Run, of_one_text, read_runs
from texts import digest

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DATA = HERE.parents[2] / "shared" / "data"
WORK = Path.home() / ".cache" / "shifcon_fast" / "experiment"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--arms", help="comma-separated; all unless given")
    parser.add_argument("--search", action="store_true", help="the runs of the search on dev territories")
    parser.add_argument("--seeds", help="comma-separated; all of each arm unless given. The base has seed 0")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of NTREX-128 and FLORES-200")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "ARM", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, arm, seed = options.one
        from one_run import one_run

        one_run(model, arm, int(seed), data=options.data, work=options.work, results=options.results)
        return
    try:
        planned = search_runs() if options.search else runs()
        wanted = chosen(planned, options.models, options.arms, options.seeds)
        held = read_runs(options.results, wanted)
        waiting = [run for run in wanted if run not in held]
        if waiting and not options.list:
            others = [run for run in (*runs(), *search_runs()) if run not in wanted]
            of_one_text(held | read_runs(options.results, others), given=digest(options.data))
    except ValueError as error:
        sys.exit(f"run.py: {error}")
    print(f"{len(wanted) - len(waiting)} of {len(wanted)} runs are done")
    if options.list or not waiting:
        print("".join(f"  missing: {model} {arm} {seed}\n" for model, arm, seed in waiting), end="")
        return
    failed = run_all(waiting, options)
    if failed:
        sys.exit(f"run.py: {len(failed)} failed: {', '.join(' '.join(map(str, run)) for run in failed)}")


def chosen(planned: Sequence[Run], models: str, arms: str | None, seeds: str | None) -> list[Run]:
    """Those of the planned runs that were asked for, in their order. The base's one run is of any seed.

    Raises:
        ValueError: a model, arm or seed that the protocol does not have.
    """
    wanted: list[list[str]] = []
    for place, (name, given) in enumerate((("models", models), ("arms", arms))):
        known = list(dict.fromkeys(str(run[place]) for run in planned))
        wanted.append(given.split(",") if given else known)
        if unknown := [each for each in wanted[-1] if each not in known]:
            raise ValueError(f"{name}: got {unknown[0]!r}; wanted some of {', '.join(known)}")
    numbers = None if seeds is None else [int(each) for each in seeds.split(",")]
    found = [
        (model, arm, seed)
        for model, arm, seed in planned
        if model in wanted[0] and arm in wanted[1] and (numbers is None or arm == BASE or seed in numbers)
    ]
    if not found:
        raise ValueError(f"seeds: got {seeds}; no arm that was asked for has one of them")
    return found


def run_all(waiting: Sequence[Run], options: argparse.Namespace) -> list[Run]:
    """Run them, some side by side; those that failed."""
    start, failed = time.monotonic(), []

    def run(which: Run) -> int | None:
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            return None
        return in_process(which, options)

    from one_run import prepare

    for model in dict.fromkeys(model for model, _, _ in waiting):
        prepare(model, data=options.data, work=options.work)  # once, before runs side by side want it
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(run, which): which for which in waiting}
        for count, future in enumerate(as_completed(running), start=1):
            which = running[future]
            code = future.result()
            if code is None:
                continue
            minutes = (time.monotonic() - start) / 60
            state = "done" if code == 0 else f"failed ({code}); see {log_of(options.work, *which)}"
            print(
                f"[{minutes:.1f} min, {count}/{len(waiting)}] {' '.join(map(str, which))}: {state}",
                flush=True,
            )
            if code != 0:
                failed.append(which)
    return failed


def in_process(which: Run, options: argparse.Namespace) -> int:
    """One run in a process of its own, with one thread; its exit status."""
    log = log_of(options.work, *which)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", __file__, "--one", *map(str, which)]
    places = {"--data": options.data, "--work": options.work, "--results": options.results}
    command += [str(part) for name, place in places.items() for part in (name, place.resolve())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    with log.open("w", encoding="utf-8") as output:
        return subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode


def log_of(work: Path, model: str, arm: str, seed: int) -> Path:
    """What a run has printed."""
    return work / "logs" / f"{model}-{arm}-{seed}.log"


if __name__ == "__main__":
    main()
