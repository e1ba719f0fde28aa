"""``info_nce`` forward and backward against bmm + cross entropy (eager, compiled), the ShifCon authors' loop per
sentence, and Inf-CL. A peer that runs out of memory is skipped with that reason."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from shifcon_fast import ops

SCALE = 20.0
# (L, N, d, dtype): what training uses, in float32 as pooling returns it; evaluation sizes; and large batches.
SIZES = (
    (10, 64, 4096, torch.float32),
    (10, 64, 4096, torch.bfloat16),
    (16, 128, 2048, torch.float32),
    (10, 512, 4096, torch.float32),
    (10, 1024, 4096, torch.bfloat16),
    (1, 8192, 1024, torch.float32),
    (1, 65536, 1024, torch.bfloat16),
    (1, 65536, 1024, torch.float32),
)
CPU_SIZES = (SIZES[0], (8, 64, 2048, torch.bfloat16))


def eager(a: Tensor, b: Tensor) -> Tensor:
    logits = torch.bmm(normalize(a, dim=-1), normalize(b, dim=-1).mT).float() * SCALE
    targets = torch.arange(a.shape[1], device=a.device).expand(a.shape[0], -1)
    return (cross_entropy(logits.mT, targets) + cross_entropy(logits, targets)) / 2


def ours(a: Tensor, b: Tensor) -> Tensor:
    return ops.info_nce(a, b, SCALE).mean()


def per_sentence(a: Tensor, b: Tensor) -> Tensor:
    """The authors' structure: a Python loop over boundaries and sentences."""
    total = a.new_zeros((), dtype=torch.float32)
    for one, other in zip(a, b, strict=True):
        for left, right in ((one, other), (other, one)):
            unit = normalize(right.float(), dim=-1)
            for i in range(left.shape[0]):
                logits = unit @ normalize(left[i].float(), dim=-1) * SCALE
                total = total + torch.logsumexp(logits, 0) - logits[i]
    return total / (2 * a.shape[0] * a.shape[1])


def inf_cl(a: Tensor, b: Tensor) -> Tensor:
    function = importlib.import_module("inf_cl").cal_inf_loss
    left, right = normalize(a[0].float(), dim=-1), normalize(b[0].float(), dim=-1)
    scale = torch.tensor(SCALE, device=a.device)
    return (function(left, right, scale=scale) + function(right, left, scale=scale)) / 2


PEERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "eager": eager,
    "torch.compile": eager,
    "loop per sentence": per_sentence,
    "Inf-CL": inf_cl,
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    "size", [*SIZES, CPU_SIZES[1]], ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}-{s[3]}".replace("torch.", "")
)
def test_loss_forward_and_backward(
    size: tuple[int, int, int, torch.dtype],
    peer: str,
    measure: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
) -> None:
    problems, count, hidden, dtype = size
    if smoke and size != SIZES[0]:
        pytest.skip("one size is enough to see that it runs")
    if device.type == "cpu" and size not in CPU_SIZES:
        pytest.skip("the CPU has sizes of its own")
    if smoke:
        problems, count, hidden = 2, 5, 16
    if peer == "loop per sentence" and count > 64:
        pytest.skip("the loop is compared at the size it was written for")
    if peer == "Inf-CL":
        pytest.importorskip("inf_cl")
        if problems != 1:
            pytest.skip("Inf-CL takes one problem")
    function = PEERS[peer]
    if peer == "torch.compile":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager" if smoke else "inductor", dynamic=False)

    def call() -> Callable[[], Any]:
        a = torch.randn(problems, count, hidden, device=device)
        b = (a + 2 * torch.randn_like(a)).to(dtype).requires_grad_()
        a = a.to(dtype).requires_grad_()
        return lambda: torch.autograd.grad(function(a, b), (a, b))

    bytes_of_one = 2 * problems * count * hidden * dtype.itemsize
    try:
        calls = [call() for _ in range(rotations(bytes_of_one))]
        expected = eager if count <= 1024 else ours
        with torch.no_grad():
            a, b = torch.randn(2, problems, min(count, 1024), hidden, device=device).to(dtype)
            torch.testing.assert_close(function(a, b).float(), expected(a, b).float(), rtol=2e-2, atol=2e-2)
        name = f"{problems}x{count}x{hidden} {dtype}".replace("torch.", "")
        # S, and one product as large for each gradient: what a peer needs that keeps S.
        flops = 6 * problems * count**2 * hidden
        measure(
            calls,
            case=f"info_nce forward + backward {name}",
            peer=peer,
            flops=flops,
            dtype=dtype,
            # The host is part of what a loop costs. And a graph keeps memory of its own: at 65,536 rows there is
            # little to spare, and no gap that shows.
            capturable=peer != "loop per sentence" and count < 65536,
        )
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        pytest.skip(f"{peer} runs out of memory")


@pytest.mark.parametrize("product", ["tile", "library"])
@pytest.mark.parametrize("count", [256, 1024, 4096, 16384])
def test_products_of_tiles_or_of_the_library(
    count: int,
    product: str,
    measure: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two ways to a tile of 16-bit products, for the table in ``kernels/contrastive_similarity.py``."""
    if device.type == "cpu" or smoke:
        pytest.skip("the kernels run on CUDA, at these sizes")
    kernels = importlib.import_module("shifcon_fast.kernels.info_nce")
    monkeypatch.setattr(kernels, "library_products", lambda _: product == "library")
    if product == "library":
        monkeypatch.setattr(torch, "bmm", partial(torch.bmm, out_dtype=torch.float32))
    sets = [
        torch.randn(2, 1, count, 2048, device=device).bfloat16()
        for _ in range(rotations(2 * count * 2048 * 2))
    ]
    calls = [lambda pair=pair: kernels.forward(*pair, SCALE, True, False) for pair in sets]
    case = f"info_nce forward, bf16, 1x{count}x2048"
    flops = 2 * count**2 * 2048
    measure(calls, case=case, peer=f"products by {product}", flops=flops, dtype=torch.bfloat16)
