"""``add_shift_rms_norm`` against eager PyTorch, ``F.rms_norm``, ``torch.compile``, Liger-Kernel and quack."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shifcon_fast import ops

EPS = 1e-6
HIDDEN = (2048, 3072, 4096, 5120, 8192)
ROWS = (8192, 32768)


def shifted(x: Tensor, residual: Tensor, shift: Tensor, index: Tensor) -> Tensor:
    h = x + residual
    return torch.where(index[:, None, None] >= 0, h + shift.to(h.dtype)[index.clamp(min=0)][:, None], h)


def eager(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers writes it."""
    h = shifted(x, residual, shift, index)
    wide = h.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(h.dtype), h


def f_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    h = shifted(x, residual, shift, index)
    return F.rms_norm(h, h.shape[-1:], weight, EPS), h


def ours(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_shift_rms_norm(x, weight, residual, shift, index, EPS)


def ours_without_shift(
    x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    return ops.add_shift_rms_norm(x, weight, residual, eps=EPS)


def liger(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's fused add + norm, and the shift as its own step, which is what its users would write."""
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_add_rms_norm
    x = torch.where(index[:, None, None] >= 0, x + shift.to(x.dtype)[index.clamp(min=0)][:, None], x)
    return function(x, residual, weight, EPS)


def quack(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """quack's fused add + norm, and the shift as its own step."""
    function = importlib.import_module("quack").rmsnorm
    x = torch.where(index[:, None, None] >= 0, x + shift.to(x.dtype)[index.clamp(min=0)][:, None], x)
    flat = x.view(-1, x.shape[-1])
    y, h = function(flat, weight, residual=residual.view_as(flat), eps=EPS, prenorm=True)[:2]
    return y.view_as(x), h.view_as(x)


PEERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "ours": ours,
    "ours, no shift": ours_without_shift,
    "eager": eager,
    "F.rms_norm": f_rms_norm,
    "torch.compile": eager,
    "Liger": liger,
    "quack": quack,
}


def prepared(peer: str, smoke: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    function = PEERS[peer]
    if peer in ("Liger", "quack"):
        pytest.importorskip({"Liger": "liger_kernel", "quack": "quack"}[peer])
        if not torch.cuda.is_available():
            pytest.skip("runs on CUDA only")
    if peer == "torch.compile":
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager" if smoke else "inductor", dynamic=False)
    return function


def inputs(rows: int, hidden: int, device: torch.device, smoke: bool) -> dict[str, Tensor]:
    batch = 1 if rows == 1 else 2 if smoke else 8
    dtype = torch.float32 if smoke and device.type == "cpu" else torch.bfloat16
    x, residual, grad_y, grad_h = torch.randn(4, batch, rows // batch, hidden, device=device, dtype=dtype)
    index = torch.arange(1, batch + 1, device=device) % 4 - 1
    return {
        "x": x,
        "residual": residual,
        "weight": torch.rand(hidden, device=device, dtype=dtype),
        "shift": torch.randn(4, hidden, device=device),
        "index": index,
        "grad_y": grad_y,
        "grad_h": grad_h,
    }


def run(function: Callable[..., tuple[Tensor, Tensor]], values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return function(*(values[name] for name in ("x", "residual", "weight", "shift", "index")))


def check(peer: str, function: Callable[..., tuple[Tensor, Tensor]], values: dict[str, Tensor]) -> None:
    """A peer that computes something else is not a peer."""
    if peer == "ours, no shift":
        return
    try:
        y, h = run(function, values)
    except (RuntimeError, TypeError, AttributeError, ValueError, ImportError) as error:
        if peer == "ours":
            raise
        pytest.skip(f"{peer} does not run here: {error}")
    expected_y, expected_h = run(
        eager, {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
    )
    for got, expected in ((y, expected_y), (h, expected_h)):
        distance = (got.float() - expected).norm() / expected.norm()
        assert distance < 2e-2, f"{peer} is off by {distance:.1e}"


def backward_call(
    function: Callable[..., tuple[Tensor, Tensor]], values: dict[str, Tensor], trainable: bool
) -> Callable[[], Any]:
    """The backward pass from dense gradients of both results; ``trainable``: into the weight as well."""
    leaves = [values["x"].requires_grad_(), values["residual"].requires_grad_()]
    if trainable:
        leaves.append(values["weight"].requires_grad_())
    outputs = run(function, values)
    upper = (values["grad_y"], values["grad_h"])
    return lambda: torch.autograd.grad(outputs, leaves, upper, retain_graph=True)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_forward(
    rows: int,
    hidden: int,
    peer: str,
    measure: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
) -> None:
    if smoke or device.type == "cpu":
        if (rows, hidden) != (ROWS[0], HIDDEN[0]):
            pytest.skip("one small size on the CPU")
        rows, hidden = (8, 64) if smoke else (2048, 2048)
    function = prepared(peer, smoke)
    first = inputs(rows, hidden, device, smoke)
    check(peer, function, first)
    moved = 4 * first["x"].nbytes
    sets = [first] + [inputs(rows, hidden, device, smoke) for _ in range(rotations(moved) - 1)]
    calls = [lambda values=values: run(function, values) for values in sets]
    with torch.no_grad():
        measure(calls, moved=moved, case=f"norm forward {rows}x{hidden}", peer=peer)


@pytest.mark.parametrize("peer", PEERS)
def test_one_small_call(peer: str, measure: Any, device: torch.device, smoke: bool) -> None:
    """What a token costs in generation; on CUDA it is launches, which the host's benchmark times."""
    if device.type == "cuda":
        pytest.skip("on CUDA a small call is its launches: see test_host.py")
    function = prepared(peer, smoke)
    values = inputs(1, 64 if smoke else 4096, device, smoke)
    with torch.no_grad():
        check(peer, function, values)
        measure([lambda: run(function, values)], case="norm, one small call, 1x4096", peer=peer)


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != "ours, no shift"])
@pytest.mark.parametrize("weight", ["frozen", "trainable"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_backward(
    hidden: int,
    weight: str,
    peer: str,
    measure: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
) -> None:
    rows = ROWS[0]
    if smoke or device.type == "cpu":
        if hidden != HIDDEN[0]:
            pytest.skip("one small size on the CPU")
        rows, hidden = (8, 64) if smoke else (2048, 2048)
    function = prepared(peer, smoke)
    check(peer, function, inputs(rows, hidden, device, smoke))

    moved = 4 * rows * hidden * 2
    calls = [
        backward_call(function, inputs(rows, hidden, device, smoke), weight == "trainable")
        for _ in range(rotations(moved))
    ]
    measure(calls, moved=moved, case=f"norm backward, weight {weight}, {rows}x{hidden}", peer=peer)


@pytest.mark.parametrize("direction", ["forward", "backward, weight frozen"])
def test_in_turns(
    direction: str, take_turns: Any, rotations: Callable[[int], int], device: torch.device, smoke: bool
) -> None:
    """The memory of a shared machine is slow for seconds at a time: all peers meet the same of it."""
    if device.type == "cuda":
        pytest.skip("a GPU is not shared; its peers are timed one after the other, in graphs")
    rows, hidden = (8, 64) if smoke else (2048, 2048)
    peers: dict[str, list[Callable[[], Any]]] = {}
    for peer in ("ours", "eager", "torch.compile"):
        function = prepared(peer, smoke)
        sets = [inputs(rows, hidden, device, smoke) for _ in range(rotations(4 * rows * hidden * 2))]
        if direction == "forward":
            peers[peer] = [lambda values=values, function=function: run(function, values) for values in sets]
        else:
            peers[peer] = [backward_call(function, values, trainable=False) for values in sets]
    with torch.set_grad_enabled(direction != "forward"):
        take_turns(peers, case=f"norm {direction}, in turns, {rows}x{hidden}")
