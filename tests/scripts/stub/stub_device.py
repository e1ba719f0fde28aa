"""A stub of a CUDA device for rehearsals on the CPU: streams, events, graphs and memory as ``torch.cuda`` has them.

Tensors that are asked for on "cuda" lie on the CPU. What the stub keeps of a device's rules are those that the
benchmarks have to obey:

* nothing may be captured on the default stream;
* an autograd node remembers the stream on which its forward ran, and a capture that meets one of the default stream
  fails (https://github.com/pytorch/pytorch/issues/164302);
* a call that reads a value back synchronises, which no capture allows;
* after a failed capture the device is lost to the process.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

FACTORIES = (
    *("randn", "rand", "randint", "randperm", "empty", "zeros", "ones", "full", "arange", "tensor"),
    "linspace",
)
READS = ("tolist", "item", "nonzero", "unique", "cpu")
OutOfMemoryError = torch.cuda.OutOfMemoryError


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = id(self)

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        synchronize()


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        check()
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        synchronize()

    def elapsed_time(self, end: Event) -> float:
        return max(1e-3, 1e3 * (end.at - self.at))


class CUDAGraph:
    """A replay takes as long as the calls took that were captured."""

    seconds: float | None = None

    def replay(self) -> None:
        check()
        if self.seconds is None:
            raise RuntimeError("the graph is empty")
        time.sleep(min(self.seconds, 0.01))


_default = Stream()
state = SimpleNamespace(current=_default, capturing=False, lost=False)


def check() -> None:
    if state.lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered (stub: the device is lost)")


def synchronize(device: Any = None) -> None:
    check()
    forbid("synchronize")


def forbid(what: str) -> None:
    """Called by what no capture allows."""
    if state.capturing:
        state.lost = True
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


@contextlib.contextmanager
def stream(which: Stream) -> Iterator[None]:
    before, state.current = state.current, which
    try:
        yield
    finally:
        state.current = before


@contextlib.contextmanager
def graph(captured: CUDAGraph, pool: Any = None, stream: Stream | None = None) -> Iterator[None]:
    check()
    where = stream or Stream()
    if where is _default:
        raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
    before, state.current, state.capturing = state.current, where, True
    start = time.perf_counter()
    try:
        yield
        captured.seconds = time.perf_counter() - start
    except BaseException:
        state.lost = True
        raise
    finally:
        state.current, state.capturing = before, False


def on_cpu(device: Any) -> Any:
    return "cpu" if device is not None and torch.device(device).type == "cuda" else device


def _factory(function: Any) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        if "device" in settings:
            settings["device"] = on_cpu(settings["device"])
        return function(*arguments, **settings)

    return call


def _read(function: Any, name: str) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        forbid(name)
        return function(*arguments, **settings)

    return call


def _requires_grad(function: Any) -> Any:
    """``Tensor.requires_grad_``, remembering the stream: that of the forward, which follows."""

    @functools.wraps(function)
    def call(tensor: Any, *arguments: Any, **settings: Any) -> Any:
        tensor.stub_stream = state.current
        return function(tensor, *arguments, **settings)

    return call


def _grad(function: Any) -> Any:
    """``torch.autograd.grad``, refusing in a capture what was recorded on the default stream."""

    @functools.wraps(function)
    def call(outputs: Any, inputs: Any, *arguments: Any, **settings: Any) -> Any:
        leaves = inputs if isinstance(inputs, tuple | list) else (inputs,)
        if state.capturing and any(getattr(leaf, "stub_stream", None) is _default for leaf in leaves):
            state.lost = True
            raise RuntimeError(
                "CUDA error: operation would make the legacy stream depend on a capturing blocking stream"
            )
        return function(outputs, inputs, *arguments, **settings)

    return call


def install() -> None:
    """Put the stub in the place of torch's own functions, for good."""
    cuda: Any = torch.cuda
    for name in FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in READS:
        setattr(torch.Tensor, name, _read(getattr(torch.Tensor, name), name))
    tensor: Any = torch.Tensor
    tensor.requires_grad_ = _requires_grad(tensor.requires_grad_)
    torch.autograd.grad = _grad(torch.autograd.grad)
    for made in (Stream, Event, CUDAGraph, graph, stream, synchronize):
        setattr(cuda, made.__name__, made)
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda device=None: "a stub of a device"
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="a stub of a device", multi_processor_count=132, total_memory=80 * 2**30, major=9, minor=0
    )
    cuda.default_stream = lambda device=None: _default
    cuda.current_stream = lambda device=None: state.current
    cuda.set_stream = lambda which: setattr(state, "current", which)
    cuda.empty_cache = cuda.reset_peak_memory_stats = lambda device=None: None
    # Dynamo keeps the generator's state while it traces.
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda new_state, device=None: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda device=None: 0
