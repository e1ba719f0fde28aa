"""``masked_mean_pool`` against eager PyTorch and ``torch.compile``, forward and backward."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from shifcon_fast import ops


def eager(h: Tensor, mask: Tensor) -> Tensor:
    selected = mask.unsqueeze(-1).float()
    return normalize((h.float() * selected).sum(1) / selected.sum(1).clamp(min=1), dim=-1)


def ours(h: Tensor, mask: Tensor) -> Tensor:
    return ops.masked_mean_pool(h, mask, normalize=True)


PEERS = {"ours": ours, "eager": eager, "torch.compile": eager}
SIZES = {"cuda": ((8, 512, 4096), (64, 256, 4096), (128, 1024, 2048)), "cpu": ((32, 128, 2048),)}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", ["forward", "backward", "forward and backward"])
@pytest.mark.parametrize("size", sorted({*SIZES["cuda"], *SIZES["cpu"]}))
def test_pooling(
    size: tuple[int, int, int],
    direction: str,
    peer: str,
    measure: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
) -> None:
    if size not in SIZES[device.type] or (smoke and size != SIZES[device.type][0]):
        pytest.skip(f"not one of the sizes that are measured on {device.type}")
    if smoke:
        size = (2, 6, 32)
    batch, tokens, hidden = size
    dtype = torch.bfloat16
    function = PEERS[peer]
    if peer == "torch.compile":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager" if smoke else "inductor", dynamic=False)
    lengths = torch.linspace(tokens // 2, tokens, batch, device=device).long()
    mask = torch.arange(tokens, device=device) < lengths.unsqueeze(1)
    # What must be read are the tokens that the mask selects; what must be written is the gradient of all.
    read = int(lengths.sum()) * hidden * dtype.itemsize
    written = batch * tokens * hidden * dtype.itemsize

    def call() -> Callable[[], Any]:
        h = torch.randn(size, device=device, dtype=dtype)
        if direction == "forward":
            return lambda: function(h, mask)
        h.requires_grad_()
        upper = torch.randn(batch, hidden, device=device)
        if direction == "backward":
            pooled = function(h, mask)
            return lambda: torch.autograd.grad(pooled, h, upper, retain_graph=True)
        return lambda: torch.autograd.grad(function(h, mask), h, upper)

    calls = [call() for _ in range(rotations(written))]
    moved = {"forward": read, "backward": written}.get(direction, read + written)
    with torch.set_grad_enabled(direction != "forward"):
        measure(calls, moved=moved, case=f"pool {direction} {'x'.join(map(str, size))}", peer=peer)
