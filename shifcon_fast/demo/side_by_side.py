"""Small independent jobs side by side: one process each, with one thread.

Not threads: OpenMP splits every tiny product, and its threads wait for one another at the end of each. Where one of
them shares its core with any other program, all of them stand still for most of the time.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

# Called with the number of steps that were done since the last call.
Report = Callable[[int], None]
# Where it runs in another process, it and what it returns are pickled.
Job = Callable[[Report], Any]

_TIME_TO_SAVE = 60  # seconds that a job has to end after the parent is gone
_POLL = 0.2  # seconds between two looks at how far the jobs are


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SideBySide:
    """A context in which jobs run; its processes are there until it ends, also after an error.

    Args:
        processes: how many jobs run at a time. With 1, they run in this process.
        around: makes the context that each job runs in.

    When a job fails, or at Ctrl-C, no further job begins, and what runs gets a SIGINT, upon which a training saves
    a checkpoint and ends. Should this process die, its children end in the same way.
    """

    def __init__(
        self, processes: int, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.processes, self._around = processes, around
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> SideBySide:
        if self.processes > 1:
            context = get_context("spawn")
            # Nothing is ever sent: this end closes when the jobs are to stop, and when this process is gone.
            listen, self._stop = context.Pipe(duplex=False)
            self._steps = context.Value("q", 0)
            self._pool = ProcessPoolExecutor(
                self.processes, context, initializer=_begin, initargs=(listen, self._steps, _log_levels())
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            self._stop.close()
        self._pool.shutdown(cancel_futures=True)
        self._stop.close()

    def run(
        self,
        jobs: Sequence[Job],
        *,
        on_steps: Report = lambda steps: None,
        on_end: Callable[[int], None] = lambda number: None,
    ) -> list[Any]:
        """The jobs' results, in their order.

        Args:
            jobs: started in this order.
            on_steps: called in this process with the steps that jobs have reported since its last call.
            on_end: called in this process with the number of a job that has ended.

        Raises:
            Exception: what the first job to fail has raised.
            RuntimeError: a process ended without a word.
        """
        if self._pool is None:
            results = []
            for number, job in enumerate(jobs):
                with self._around():
                    results.append(job(on_steps))
                on_end(number)
            return results
        try:
            self._start_processes(self._pool, len(jobs))
            return self._run(self._pool, jobs, on_steps, on_end)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"one of {self.processes} processes that ran side by side was ended from outside, as systems do "
                "when memory runs out; run fewer at a time (`--jobs 1`)"
            ) from error

    def _start_processes(self, pool: ProcessPoolExecutor, jobs: int) -> None:
        """Have the processes there before the first job.

        The pool begins to watch for the death of a process at the next result that it gets after starting it
        (CPython 3.11 wakes its watcher before the start), so a job's process that dies at once could go
        unnoticed until another job ends.
        """
        with _what_children_inherit():
            ready = [pool.submit(_is_ready) for _ in range(min(self.processes, jobs))]
        for future in ready:
            future.result()

    def _run(
        self, pool: ProcessPoolExecutor, jobs: Sequence[Job], on_steps: Report, on_end: Callable[[int], None]
    ) -> list[Any]:
        results: dict[int, Any] = {}
        running: dict[Future[Any], int] = {}
        queue, told = iter(enumerate(jobs)), self._steps.value
        while len(results) < len(jobs):
            # No more than can run: what the pool has taken cannot be called back.
            for number, job in islice(queue, self.processes - len(running)):
                with _what_children_inherit():
                    running[pool.submit(_run, job, self._around)] = number
            ended, _ = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED)
            steps = self._steps.value
            on_steps(steps - told)
            told = steps
            for future in ended:
                number = running.pop(future)
                results[number] = future.result()
                on_end(number)
        return [results[number] for number in range(len(jobs))]


def _log_levels() -> dict[str, int]:
    """What this process has set: what is silent here stays silent in its children."""
    loggers = logging.root.manager.loggerDict.items()
    return {name: each.level for name, each in loggers if isinstance(each, logging.Logger) and each.level}


@contextmanager
def _what_children_inherit() -> Iterator[None]:
    """One thread, also in libraries that PyTorch cannot tell; and SIGINT held back until they are ready for it."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    masks = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else set()
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


# --- in the children ----------------------------------------------------------------------------------------------

_stopped, _idle = threading.Event(), threading.Event()
_steps: Any = None


def _begin(stop: Connection, steps: Any, log_levels: dict[str, int]) -> None:
    """Make a new process ready: one thread, and no SIGINT but the one that :func:`_watch` sends to a job."""
    global _steps  # noqa: PLW0603 - the process is one job's at a time
    _steps = steps
    for name, level in log_levels.items():
        logging.getLogger(name).setLevel(level)
    _idle.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        # Ctrl-C at the terminal reaches the parent alone: a training takes a second SIGINT as "abort at once".
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()


def _watch(stop: Connection) -> None:
    stop.poll(None)
    _stopped.set()
    os.kill(os.getpid(), signal.SIGINT)
    parent = parent_process()
    assert parent is not None
    parent.join()
    _idle.wait(_TIME_TO_SAVE)
    os._exit(1)  # nobody is there to tell what became of the job


def _is_ready() -> None:
    """What a process does first."""


def _run(job: Job, around: Callable[[], AbstractContextManager[Any]]) -> Any:
    _idle.clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _stopped.is_set():
            raise KeyboardInterrupt
        with around():
            return job(_add_steps)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _idle.set()


def _add_steps(steps: int) -> None:
    with _steps.get_lock():
        _steps.value += steps
