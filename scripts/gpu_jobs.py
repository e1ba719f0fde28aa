"""Commands that run side by side until a deadline, for ``gpu_check.py``; what they started is stopped with them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOST = 77  # exit status: this process may have lost the device, a new one is to go on (gpu_record.py)
NOTHING_TO_RUN = 5  # pytest's exit status where no test is left
MOST_RESTARTS = 5
MOST_LOGGED = 2**20  # bytes of a job's output that the log keeps
GRACE = 6  # seconds between the request to stop, upon which pytest still sums up, and the end


@dataclass(frozen=True)
class Job:
    """One command; ``missing`` says why it cannot apply here. ``before`` runs before each start of it."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None
    before: Callable[[], object] | None = None


@dataclass
class Outcome:
    """``passed`` is None where a job could not apply."""

    passed: bool | None
    seconds: float
    reason: str | None = None
    restarts: int = 0


class _Running:
    def __init__(self, job: Job, cwd: Path) -> None:
        self.job, self.cwd, self.restarts = job, cwd, 0
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed where it is read
        self.start = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        if self.job.before is not None:
            self.job.before()
        self.process = subprocess.Popen(
            self.job.command,
            cwd=self.cwd,
            env={**os.environ, **self.job.environment},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_interrupts,  # noqa: PLW1509 - there are no threads here
        )

    def ended(self) -> bool:
        """Whether it has; one that lost the device begins anew, in a process that has it."""
        if self.process.poll() is None:
            return False
        if self.process.returncode == LOST and self.restarts < MOST_RESTARTS:
            self.restarts += 1
            self._begin()
            return False
        return True

    def outcome(self, late: bool, limit: float) -> Outcome:
        seconds = round(time.monotonic() - self.start, 1)
        reason = f"stopped after {limit:.0f} s" if late else None
        if not late and self.process.returncode not in (0, NOTHING_TO_RUN):
            reason = f"exit status {self.process.returncode}"
        return Outcome(reason is None, seconds, reason, self.restarts)


def run_together(jobs: Sequence[Job], deadline: float, log: Path, cwd: Path) -> dict[str, Outcome]:
    """Run jobs side by side until each has ended, or until ``deadline`` (monotonic seconds), the stopping included.

    A job's output is appended to ``log`` when it ends. One that runs over is interrupted, then killed with whatever
    it started. If this call is interrupted itself, so are the jobs.
    """
    outcomes: dict[str, Outcome] = {}
    running: dict[str, _Running] = {}
    last = deadline - GRACE
    limit = last - time.monotonic()
    for job in jobs:
        if job.missing is not None:
            outcomes[job.name] = Outcome(None, 0.0, job.missing)
        elif limit < 2:
            outcomes[job.name] = Outcome(False, 0.0, "no time was left")
        else:
            running[job.name] = _Running(job, cwd)
    if running:
        print(f"== {', '.join(running)} (at most {limit:.0f} s)", flush=True)
    try:
        while running:
            time.sleep(0.05)
            late = time.monotonic() >= last
            if late:
                _stop([each.process for each in running.values()])
            for name, each in list(running.items()):
                if late or each.ended():
                    outcomes[name] = each.outcome(late, limit)
                    _keep_output(name, outcomes[name], each.output, log)
                    del running[name]
    finally:
        if running:
            _stop([each.process for each in running.values()])
            for name, each in running.items():
                _keep_output(name, Outcome(False, 0.0, "interrupted"), each.output, log)
    return outcomes


def _heed_interrupts() -> None:
    """In a job, before it begins: a shell that starts a program in the background has it ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
    end = time.monotonic() + GRACE - 1
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        # What it started may outlive it; they are a session of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _keep_output(name: str, outcome: Outcome, output: Any, log: Path) -> None:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - MOST_LOGGED))
    text = output.read().decode(errors="replace")
    output.close()
    title = f"== {name}: {'passed' if outcome.passed else outcome.reason} in {outcome.seconds:.1f} s"
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"{title}\n{text}\n")
    # A line or two of what passed; more of what did not.
    print(title, *text.splitlines()[-2 if outcome.passed else -12 :], sep="\n", flush=True)
