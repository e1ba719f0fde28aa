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
SIZES = ((8, 512, 4096), (64, 256, 4096), (128, 1024, 2048))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size", SIZES)
def test_pooling(
    size: tuple[int, int, int],
    direction: str,
    peer: str,
    measure: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
) -> None:
    if (smoke or device.type == "cpu") and size != SIZES[0]:
        pytest.skip("one size on the CPU")
    if smoke:
        size = (2, 6, 32)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    function = PEERS[peer]
    if peer == "torch.compile":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager" if smoke else "inductor", dynamic=False)

    def call() -> Callable[[], Any]:
        h = torch.randn(size, device=device, dtype=dtype)
        mask = torch.arange(size[1], device=device) < torch.randint(
            size[1] // 2, size[1] + 1, (size[0], 1), device=device
        )
        if direction == "forward":
            return lambda: function(h, mask)
        h.requires_grad_()
        pooled = function(h, mask)
        upper = torch.randn_like(pooled)
        return lambda: torch.autograd.grad(pooled, h, upper, retain_graph=True)

    moved = size[0] * size[1] * size[2] * dtype.itemsize
    calls = [call() for _ in range(rotations(moved))]
    name = "x".join(map(str, size))
    if direction == "forward":
        with torch.no_grad():
            measure(calls, moved=moved, case=f"pool forward {name}", peer=peer)
    else:
        measure(calls, moved=moved, case=f"pool backward {name}", peer=peer)
