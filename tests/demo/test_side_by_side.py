"""Jobs in processes of their own: in order, one thread each, and none is left behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shifcon_fast.demo.side_by_side import SideBySide, usable_cores

posix = pytest.mark.skipif(os.name != "posix", reason="sends signals to processes; POSIX only")

# A program whose jobs write down what happens to them. "wait" is like a training: at SIGINT it saves, for a while,
# and a second SIGINT would end that.
PROGRAM = """
import contextlib, logging, os, signal, sys, time
from functools import partial
from pathlib import Path
from shifcon_fast.demo.side_by_side import SideBySide

folder = Path({folder!r})

@contextlib.contextmanager
def around():
    os.environ["AROUND"] = "yes"
    yield
    del os.environ["AROUND"]

def level(report):
    return logging.getLogger("a.library").level

def number(n, report):
    for _ in range(n):
        report(1)
    return n, os.environ["OMP_NUM_THREADS"], os.environ["AROUND"], os.getpid()

def wait(name, report):
    (folder / f"{{name}}.pid").write_text(str(os.getpid()))
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        time.sleep(0.5)
        (folder / f"{{name}}.saved").touch()
        raise

def fail(report):
    while len(list(folder.glob("*.pid"))) < 1:
        time.sleep(0.01)
    raise ValueError("this job fails")

def die(report):
    os._exit(3)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a shell's background
    logging.getLogger("a.library").setLevel(logging.ERROR)
    with SideBySide(2, around) as side_by_side:
        {body}
"""


def start(folder: Path, body: str) -> subprocess.Popen[str]:
    script = folder / "program.py"
    script.write_text(PROGRAM.format(folder=str(folder), body=body), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal of its own, so to speak
    )


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def pids(folder: Path) -> list[int]:
    return [int(text) for file in folder.glob("*.pid") if (text := file.read_text(encoding="utf-8"))]


TWO_AND_A_THIRD = "side_by_side.run([partial(wait, 'one'), partial(wait, 'two'), partial(wait, 'three')])"


def test_results_come_in_order_and_every_step_is_told(tmp_path: Path) -> None:
    body = """
        steps, ends = [], []
        out = side_by_side.run([partial(number, n) for n in (3, 1, 2)], on_steps=steps.append, on_end=ends.append)
        print([o[:3] for o in out], sum(steps), sorted(ends), os.getpid() in [o[3] for o in out])
        print(side_by_side.run([level])[0] == logging.ERROR)
        print(side_by_side.run([partial(number, 5)], on_steps=steps.append)[0][0], sum(steps))
    """
    said, complained = start(tmp_path, body.strip()).communicate(timeout=100)
    assert complained == ""
    assert said.splitlines() == [
        "[(3, '1', 'yes'), (1, '1', 'yes'), (2, '1', 'yes')] 6 [0, 1, 2] False",
        "True",
        "5 11",
    ]


def test_one_at_a_time_needs_no_other_process() -> None:
    steps: list[int] = []
    ends: list[int] = []

    def job(report: Callable[[int], None]) -> int:
        report(2)
        return os.getpid()

    with SideBySide(1) as side_by_side:
        assert side_by_side.run([job, job], on_steps=steps.append, on_end=ends.append) == [os.getpid()] * 2
    assert (steps, ends) == ([2, 2], [0, 1])


@posix
def test_a_failure_stops_the_others_and_is_what_is_raised(tmp_path: Path) -> None:
    process = start(tmp_path, "side_by_side.run([partial(wait, 'one'), fail, partial(wait, 'three')])")
    _, complained = process.communicate(timeout=100)
    assert process.returncode == 1
    assert complained.rstrip().endswith("ValueError: this job fails")
    assert (tmp_path / "one.saved").exists()
    assert not (tmp_path / "three.pid").exists()
    assert not any(map(is_alive, pids(tmp_path)))


@posix
@pytest.mark.parametrize("whom", ["the program alone", "all of the terminal's processes"])
def test_ctrl_c_reaches_each_job_once(tmp_path: Path, whom: str) -> None:
    process = start(tmp_path, TWO_AND_A_THIRD)
    eventually(lambda: len(pids(tmp_path)) == 2, "two jobs begin")
    (os.kill if whom == "the program alone" else os.killpg)(process.pid, signal.SIGINT)
    _, complained = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGINT
    assert complained.rstrip().endswith("KeyboardInterrupt")
    assert sorted(file.name for file in tmp_path.glob("*.saved")) == ["one.saved", "two.saved"]
    assert not (tmp_path / "three.pid").exists()
    assert not any(map(is_alive, pids(tmp_path)))


@posix
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_without_its_parent_a_job_saves_and_ends(tmp_path: Path, how: signal.Signals) -> None:
    process = start(tmp_path, TWO_AND_A_THIRD)
    eventually(lambda: len(pids(tmp_path)) == 2, "two jobs begin")
    process.send_signal(how)
    process.communicate(timeout=100)  # until the last of the children has closed what it prints to
    eventually(lambda: not any(map(is_alive, pids(tmp_path))), "the children end")
    assert sorted(file.name for file in tmp_path.glob("*.saved")) == ["one.saved", "two.saved"]
    assert not (tmp_path / "three.pid").exists()


@posix
def test_a_process_that_dies_is_said_to_have(tmp_path: Path) -> None:
    process = start(tmp_path, "side_by_side.run([partial(wait, 'one'), die])")
    _, complained = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "RuntimeError: one of 2 processes that ran side by side was ended from outside" in complained
    assert not any(map(is_alive, pids(tmp_path)))


def test_there_is_a_core_to_run_on() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
