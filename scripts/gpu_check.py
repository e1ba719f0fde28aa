"""Everything that needs a CUDA machine, from a bare checkout with torch and Triton, within a budget of seconds.

    scripts/gpu_check.sh OUT --call 1 --seconds 270 --commit ID                 the first call
    scripts/gpu_check.sh OUT --call 2 --seconds 300 --commit ID --after FIRST   the second; FIRST is the first's OUT
    scripts/gpu_check.sh OUT [--only PART,PART...] [--skip PART,PART...]        all parts, or some

docs/gpu.md says what to do before, between and after the calls. Parts run in the order of their value, each in
processes of its own, and what they find is on disk when it is known: a call that is cut off loses nothing.

* load (always): the wheels of ``wheels/``, the sources, the compiled libraries; which backend each operator has
* small: one small call per operator, forward and backward, against float64
* ceilings: the copy's bandwidth and the matrix product's rate, before anything else is timed
* contract, captures, models, large: tests, side by side: the operators' contract, CUDA graphs (a process each),
  attached models with NF4 training, tensors of more than 2**31 elements
* warm: compiles, beside them, what the parts below time
* norm, info_nce, projection, host, info_nce_65536: the benchmarks that the goals ask for, ours first
* missed: those that FIRST missed or lacks, with all peers
* step: real training steps of a random Llama-3-8B in NF4: plain, the authors' recipe, ours
* memcheck: compute-sanitizer on the small calls, our kernels only
* sanitizer, benchmarks, variants (in no call): memcheck and racecheck on every kernel; every benchmark; every
  variant of the step

Nothing is fetched. OUT gets environment.json (first; device, driver, versions, commit, backends, and for each job
what came out and how long it took), ceilings.json, tests.jsonl, benchmarks.jsonl, step.json and log.txt. Exit
status 0 if every job passed or could not apply, 1 if one failed, 2 without a CUDA device.

SHIFCON_REHEARSE=1 rehearses a run on the CPU, with tiny sizes and a stub of the device (tests/scripts/stub).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import goals
from gpu_jobs import Outcome, run_together
from gpu_parts import GROUPS, ROOT, Check, read_rows

TOTAL_SECONDS = 530
# Parts of a phase run side by side, phases one after the other. A number is what a phase leaves to it at least, in
# seconds: each may take longer by what those before it left.
Plan = tuple[tuple[tuple[str, ...], int], ...]
CALLS: dict[int, Plan] = {
    1: (
        (("small",), 30),
        (("ceilings",), 18),
        (("contract", "captures", "warm"), 70),
        (("norm",), 40),
        (("info_nce",), 28),
        (("projection",), 28),
        (("host",), 20),
    ),
    2: (
        (("ceilings",), 18),
        (("small", "contract", "captures", "models", "large", "warm"), 70),
        (("missed",), 45),
        (("step",), 75),
        (("info_nce_65536",), 25),
        (("memcheck",), 40),
    ),
}
EVERYTHING: Plan = (
    (("small",), 30),
    (("ceilings",), 15),
    (("contract", "captures", "models", "large"), 120),
    *(((group,), 20) for group in GROUPS),
    (("step",), 75),
    (("memcheck",), 35),
    (("sanitizer",), 20),
    (("variants",), 20),
    (("benchmarks",), 20),
)
PARTS = (
    *dict.fromkeys(part for plan in (EVERYTHING, *CALLS.values()) for phase, _ in plan for part in phase),
)
LOAD_SECONDS = 60
PACKAGES = (
    *(
        "torch",
        "triton",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "numpy",
        "pytest",
        "pytest-xdist",
    ),
    *("liger-kernel", "quack-kernels", "inf-cl"),
)


def describe(check: Check, commit: str | None) -> dict[str, Any]:
    """Device, driver, versions and commit; what is known before anything has run."""
    import torch

    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,compute_mode"
    return {
        "commit": commit or _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or None,
        "device": "none: a rehearsal on the CPU" if check.rehearsed else torch.cuda.get_device_name(),
        "driver": _output(["nvidia-smi", query, "--format=csv,noheader"]),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": found,
        "arguments": sys.argv[1:],
    }


def describe_loaded(check: Check) -> dict[str, Any]:
    """What the wheels brought, and which backend each operator runs."""
    brought = {d.metadata["Name"]: d.version for d in metadata.distributions(path=[str(check.wheels)])}
    report = (
        "import json; from shifcon_fast import ops; print(json.dumps({f'{r.operator} on {r.device}': "
        "{'chosen': r.chosen, 'others': r.reasons} for r in ops.backend_report()}))"
    )
    backends = _output([sys.executable, "-c", report], check.environment).splitlines()
    return {"wheels": brought, "backends": json.loads(backends[-1]) if backends else None}


def _output(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except FileNotFoundError:
        return ""
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{command[0]}: {error}\n{getattr(error, 'stderr', None) or ''}"[-2000:], file=sys.stderr)
        return ""
    return done.stdout.strip()


def chosen_plan(options: argparse.Namespace) -> Plan:
    """The phases that will run.

    Raises:
        SystemExit: an unknown part; the known ones are listed. A second call without the first one's record.
    """
    for flag in ("only", "skip"):
        names = set(filter(None, (getattr(options, flag) or "").split(",")))
        if unknown := sorted(names - set(PARTS)):
            raise SystemExit(f"--{flag}: got {', '.join(unknown)}; wanted some of {', '.join(PARTS)}")
    plan = EVERYTHING if options.call is None else CALLS[options.call]
    if options.only:
        wanted = options.only.split(",")
        plan = tuple((tuple(p for p in phase if p in wanted), least) for phase, least in plan)
        listed = {part for phase, _ in plan for part in phase}
        plan = (*plan, *(((part,), 20) for part in wanted if part not in listed))
    skipped = (options.skip or "").split(",")
    plan = tuple((tuple(p for p in phase if p not in skipped), least) for phase, least in plan)
    plan = tuple((phase, least) for phase, least in plan if phase)
    if options.after is None and any("missed" in phase for phase, _ in plan):
        raise SystemExit("--after: got none; wanted the folder with the first call's records")
    return plan


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    deadline = start + options.seconds
    plan = chosen_plan(options)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    outcomes: dict[str, Outcome] = {}

    def write() -> None:
        record["jobs"] = {name: vars(outcome) for name, outcome in outcomes.items()}
        record["seconds"] = round(time.monotonic() - start, 1)
        text = json.dumps(record, indent=2) + "\n"
        (out / "environment.json").write_text(text, encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        check = Check(out.resolve(), Path(folder), options)
        for file in (check.log, check.tests, check.out / "benchmarks.jsonl"):
            file.unlink(missing_ok=True)
        record |= describe(check, options.commit)
        write()
        try:
            left = sum(least for _, least in plan)
            outcomes |= _load(check, max(deadline - left, time.monotonic() + LOAD_SECONDS))
            record |= describe_loaded(check)
            write()
            for phase, least in plan:
                left -= least
                jobs = [job for part in phase for job in check.jobs(part)]
                outcomes |= run_together(jobs, min(deadline, deadline - left), check.log, check.scratch)
                record.setdefault("state", {})[",".join(phase)] = _state()
                write()
        finally:  # also where the call is cut off
            write()
            print(summary(check, outcomes))
    return int(any(outcome.passed is False for outcome in outcomes.values()))


def _load(check: Check, deadline: float) -> dict[str, Outcome]:
    outcomes = run_together([check.install_wheels()], deadline, check.log, check.scratch)
    reason = check.take_sources()
    if reason is None:
        return outcomes
    print(f"the libraries are compiled here: {reason}")
    return outcomes | run_together([check.build()], deadline, check.log, check.scratch)


def _state() -> str:
    """Clocks, temperature and what holds the clocks back, when a phase has just ended."""
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    return _output(["nvidia-smi", query, "--format=csv,noheader"]) if shutil.which("nvidia-smi") else ""


def summary(check: Check, outcomes: dict[str, Outcome]) -> str:
    """What a reader of the last screen needs: jobs, goals, then the tests that failed."""
    lines = ["", "== jobs"]
    for name, outcome in outcomes.items():
        said = {True: "passed", False: "FAILED", None: "left out"}[outcome.passed]
        again = f", {outcome.restarts} restarts" if outcome.restarts else ""
        lines.append(f"{name:20s} {outcome.seconds:6.1f} s  {said}{again}  {outcome.reason or ''}".rstrip())
    rows, _ = goals.read(check.out)
    lines += ["", f"== goals ({len(rows)} benchmarks)", goals.table(check.out)]
    failed = [row for row in read_rows(check.tests) if row["outcome"] == "failed"]
    lines += ["", f"== {len(failed)} failing tests"]
    for row in failed[:40]:
        first = (row["message"] or "").splitlines()[:1]
        lines.append(f"{row['id']}: {''.join(first)[:100]}")
    if len(failed) > 40:
        lines.append(f"... and {len(failed) - 40} more in tests.jsonl")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="folder for everything that is written")
    add("--call", type=int, choices=sorted(CALLS), help="the parts of the first or the second call")
    add(
        "--seconds",
        type=float,
        default=TOTAL_SECONDS,
        help="what everything may take, %(default)s by default",
    )
    add("--after", type=Path, metavar="FIRST", help="the first call's OUT: what passed there is left out")
    add("--only", metavar="PART,...", help=f"of the parts only these: {', '.join(PARTS)}")
    add("--skip", metavar="PART,...", help="of the parts not these")
    add("--commit", help="what to record as the commit; by default git is asked")
    add("--keyword", metavar="EXPR", help="of tests and benchmarks only pytest's -k EXPR")
    add("--workers", type=int, help="processes for the contract and the models; 6 and 3 by default")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for every job; may be repeated")
    add("--no-wheel", action="append", default=[], metavar="NAME", help="a wheel to leave; may be repeated")
    add("--build", action="store_true", help="compile the libraries there, whatever wheels/ has")
    add(
        "--no-kernel-filter", action="store_true", help="compute-sanitizer checks every kernel, PyTorch's too"
    )
    add("--size", default="llama-3-8b", choices=("llama-3-8b", "1b"), help="the model of the training step")
    options = parser.parse_args(arguments)
    if options.after is not None:
        if not (options.after / "environment.json").exists():
            parser.error(
                f"--after: there is no environment.json in {options.after}; wanted the first call's OUT"
            )
        options.after = options.after.resolve()  # jobs run elsewhere
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    chosen_plan(options)
    try:
        import torch

        found = torch.cuda.is_available() or os.environ.get("SHIFCON_REHEARSE") == "1"
    except ImportError:
        found = False
    if not found:
        print(
            f"{sys.executable}: no PyTorch that sees a CUDA device; without one, make test checks all that can be "
            "checked",
            file=sys.stderr,
        )
        return 2
    # A call that is ended from outside still sums up.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(options)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
