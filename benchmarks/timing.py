"""Times of a call: between CUDA events, in a graph or not, or by the clock; always medians with their spread.

On CUDA everything happens on one stream of the process, see ``use_one_stream``.

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
MOST_ROUNDS = 101
BUDGET = 1.0  # seconds of device time that one figure may take


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


def use_one_stream() -> None:
    """Make a stream of its own the current one, for good; call it before the first tensor is made.

    Autograd runs a backward on the stream of its forward, and a graph cannot be captured on a stream that waits for
    the default one (https://github.com/pytorch/pytorch/issues/164302). So forward, warm-up, capture and replay all
    share this stream.
    """
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())


def rounds_within(seconds: float, budget: float = BUDGET) -> int:
    """How many rounds of ``seconds`` fit into the budget: at least 1, and no more than make a median better."""
    return max(1, min(MOST_ROUNDS, int(budget / max(seconds, 1e-7))))


def time_in_graph(calls: Sequence[Call], budget: float = BUDGET) -> Timing:
    """Device time per call, from replays of a CUDA graph that holds every call once.

    Raises:
        RuntimeError: the current stream is the default one, or a call synchronises or otherwise cannot be captured,
            after which the process may be unable to use the device.
    """
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        raise RuntimeError("nothing can be captured on the default stream: call use_one_stream() first")
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    timing = _between_events(graph.replay, len(calls), budget)
    del kept
    return timing


def time_with_events(calls: Sequence[Call], budget: float = BUDGET) -> Timing:
    """Time per call between CUDA events, gaps that the host leaves included; for what a graph cannot hold."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return _between_events(all_of_them, len(calls), budget)


def _between_events(function: Call, count: int, budget: float) -> Timing:
    """One round to warm up, which tells how many fit into the budget."""

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    rounds = rounds_within(once(), budget)
    return Timing.of([once() / count for _ in range(rounds)])


def time_host(calls: Sequence[Call], rounds: int = ROUNDS, warmup: int = 3) -> Timing:
    """Time until a call returns: on the CPU all of it, on CUDA what the host spends before the device is done."""
    turns = itertools.cycle(calls)
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
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
