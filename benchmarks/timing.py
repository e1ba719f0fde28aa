"""Times of a call: between CUDA events, in a graph or not, or by the clock; always medians with their spread.

The calls of a sequence do the same work on other inputs. They take turns, so that inputs which together exceed the
last-level cache are cold each time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
ROUNDS = 15


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over ``rounds`` and the distance between their quartiles."""

    median: float
    iqr: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        lower, _, upper = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (0.0, 0.0, 0.0)
        return cls(statistics.median(seconds), upper - lower, len(seconds))


def time_in_graph(calls: Sequence[Call], rounds: int = ROUNDS) -> Timing:
    """Device time per call, from replays of a CUDA graph that holds every call once.

    Raises:
        RuntimeError: a call synchronises or otherwise cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    for _ in range(3):
        graph.replay()
    timing = _between_events(graph.replay, len(calls), rounds)
    del kept
    return timing


def time_with_events(calls: Sequence[Call], rounds: int = ROUNDS) -> Timing:
    """Time per call between CUDA events, gaps that the host leaves included; for what a graph cannot hold."""

    def all_of_them() -> None:
        for call in calls:
            call()

    all_of_them()
    return _between_events(all_of_them, len(calls), rounds)


def _between_events(function: Call, count: int, rounds: int) -> Timing:
    seconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / count)
    return Timing.of(seconds)


def time_host(calls: Sequence[Call], rounds: int = ROUNDS) -> Timing:
    """Time until a call returns: on the CPU all of it, on CUDA what the host spends before the device is done."""
    turns = itertools.cycle(calls)
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(3):
        next(turns)()
    seconds = []
    for _ in range(rounds):
        call = next(turns)
        synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def rounds_and_iterations(seconds: float, budget: float = 1.5) -> tuple[int, int]:
    """How often to measure a call of about ``seconds``: at least 15 rounds, each long against the clock's grain."""
    iterations = max(1, round(2e-4 / max(seconds, 1e-7)))
    return max(ROUNDS, min(601, int(budget / (seconds * iterations)))), iterations
