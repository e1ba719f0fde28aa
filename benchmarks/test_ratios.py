"""Ours and eager PyTorch in turns, in one process: ratios that the noise of a shared machine does not reach.

What is committed of it is what ``make test-all`` compares with (``ratios.py``). The peers are those of the suites
of the single operators; *eager* is what a user writes in the dtype of x.
"""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

norm = importlib.import_module("test_norm")
pooling = importlib.import_module("test_pooling")
contrastive = importlib.import_module("test_contrastive")
projection = importlib.import_module("test_projection")
Calls = list[Callable[[], Any]]


def copy_calls(device: torch.device, smoke: bool) -> tuple[Calls, int]:
    """A copy of a large tensor, and the bytes that it reads and writes."""
    source = torch.randn(2**16 if smoke else 2**26, device=device)
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)], 2 * source.nbytes


@pytest.mark.parametrize("weight", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_norm(
    direction: str,
    weight: str,
    take_turns: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
) -> None:
    """A float32 weight beside 16-bit rows is what PEFT's preparation for 4-bit training leaves."""
    rows, hidden = (8, 64) if smoke else (2048, 2048)
    moved = 4 * rows * hidden * 2
    sets = []
    for _ in range(rotations(moved)):
        values = norm.inputs(rows, hidden, device, False)
        values["weight"] = values["weight"].to(getattr(torch, weight))
        sets.append(values)

    def calls(function: Callable[..., Any]) -> Calls:
        if direction == "forward":
            return [lambda values=values: norm.run(function, values) for values in sets]
        return [norm.backward_call(function, values, trainable=False) for values in sets]

    peers = {"ours": calls(norm.ours)}
    if weight == "bfloat16":  # eager's result would be float32: another function
        peers["eager"] = calls(norm.eager)
        if direction == "forward":
            peers["F.rms_norm"] = calls(norm.f_rms_norm)
    else:
        peers["eager"] = calls(eager_rounded)
    peers["copy"], copied = copy_calls(device, smoke)
    with torch.set_grad_enabled(direction != "forward"):
        case = f"norm {direction}, {weight} weight, {rows}x{hidden}"
        take_turns(peers, case=case, moved=moved, copied=copied)


def eager_rounded(
    x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """As transformers writes it, and its float32 result back in the dtype of x, as the next layer needs it."""
    y, h = norm.eager(x, residual, weight, shift, index)
    return y.to(x.dtype), h


def test_one_small_call(take_turns: Any, device: torch.device, smoke: bool) -> None:
    """What a token costs in generation: on the CPU mostly the way to the operator."""
    values = norm.inputs(1, 64 if smoke else 4096, device, False)
    peers = {
        peer: [lambda f=function: norm.run(f, values)]
        for peer, function in (
            ("ours", norm.ours),
            ("eager", norm.eager),
            ("F.rms_norm", norm.f_rms_norm),
        )
    }
    with torch.no_grad():
        take_turns(peers, case="norm, one small call, 1x4096", several=1 if smoke else 50)


def test_pooling(take_turns: Any, rotations: Callable[[int], int], device: torch.device, smoke: bool) -> None:
    batch, tokens, hidden = (2, 6, 32) if smoke else (32, 128, 2048)
    lengths = torch.linspace(tokens // 2, tokens, batch, device=device).long()
    mask = torch.arange(tokens, device=device) < lengths.unsqueeze(1)

    def call(function: Callable[..., Tensor]) -> Callable[[], Any]:
        h = torch.randn(batch, tokens, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
        upper = torch.randn(batch, hidden, device=device)
        return lambda: torch.autograd.grad(function(h, mask), h, upper)

    count = rotations(4 * batch * tokens * hidden)
    peers = {
        peer: [call(function) for _ in range(count)]
        for peer, function in (("ours", pooling.ours), ("eager", pooling.eager))
    }
    take_turns(peers, case=f"pool forward + backward {batch}x{tokens}x{hidden}")


def test_info_nce(take_turns: Any, device: torch.device, smoke: bool) -> None:
    problems, count, hidden = (2, 5, 16) if smoke else (8, 64, 2048)
    a = torch.randn(problems, count, hidden, device=device)
    b = (a + 2 * torch.randn_like(a)).bfloat16().requires_grad_()
    a = a.bfloat16().requires_grad_()
    peers = {
        peer: [lambda f=function: torch.autograd.grad(f(a, b), (a, b))]
        for peer, function in (("ours", contrastive.ours), ("eager", contrastive.eager))
    }
    take_turns(peers, case=f"info_nce forward + backward {problems}x{count}x{hidden}")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_projection(
    direction: str, take_turns: Any, rotations: Callable[[int], int], device: torch.device, smoke: bool
) -> None:
    rows, hidden, languages, rank = (32, 64, 4, 8) if smoke else (4096, 2048, 8, 64)
    count = min(4, rotations(4 * rows * hidden))
    sets = [projection.inputs(rows, hidden, languages, rank, device) for _ in range(count)]

    def call(function: Callable[..., Tensor], values: Any) -> Callable[[], Any]:
        if direction == "forward":
            return lambda: function(*values)
        leaf, upper = values[0].detach().requires_grad_(), torch.randn_like(values[0])
        moved = function(leaf, *values[1:])
        return lambda: torch.autograd.grad(moved, leaf, upper, retain_graph=True)

    with torch.set_grad_enabled(direction != "forward"):
        peers = {
            peer: [call(projection.PEERS[peer], values) for values in sets]
            for peer in ("ours", "eager", "eager, float32 inside")
        }
        case = f"projection {direction} {rows}x{hidden}, {languages} languages, rank {rank}"
        take_turns(peers, case=case)
