"""Large results are written past the cache, and are the same bits as those written into it.

This file is also a program: it prints a digest per case, with the cache of ``SHIFCON_CACHE_BYTES``. The tests
below run it for a cache that holds nothing, where every result goes past it, and for one that holds everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shifcon_fast import _native, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = list(_native.LEVELS)
# In float32, rows of 16 and 80 numbers begin on cache lines and end in less than the two vectors that kernels
# take at a time; no row of 100 is written past the cache.
WIDTHS = (16, 80, 480, 2048, 100)


def norms(width: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    x, residual, grad_y, grad_h = torch.randn(4, 3, 7, width).to(dtype)
    strided = torch.randn(3, width, 7).to(dtype).transpose(1, 2)
    weight, shift = torch.rand(width), torch.randn(4, width)
    index = torch.tensor([-1, 0, 3])
    for style in ("llama", "gemma", "olmo"):
        for table in (torch.float32, dtype):
            leaves = [t.detach().requires_grad_() for t in (x, residual, weight.to(table), shift.to(table))]
            outputs = ops.add_shift_rms_norm(leaves[0], leaves[2], leaves[1], leaves[3], index, style=style)
            grads = torch.autograd.grad(outputs, leaves, (grad_y, grad_h))
            yield f"norm {style} {table}", [*outputs, *grads]
    frozen = x.detach().requires_grad_()
    outputs = ops.add_shift_rms_norm(frozen, weight, residual)
    yield "norm, grad of h alone", list(torch.autograd.grad(outputs[1], frozen, grad_h, retain_graph=True))
    yield "norm, grad of y alone", list(torch.autograd.grad(outputs[0], frozen, grad_y))
    with torch.no_grad():
        yield "norm, nothing added", list(ops.add_shift_rms_norm(x, weight))
        yield "norm, strided", list(ops.add_shift_rms_norm(strided, weight, residual, shift, index))


def pools(width: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    h = torch.randn(3, 9, width).to(dtype).requires_grad_()
    mask = torch.arange(9)[None] < torch.tensor([[9], [4], [0]])
    for normalize in (False, True):
        grad = torch.randn(3, width)
        pooled = ops.masked_mean_pool(h, mask, normalize=normalize)
        yield f"pool {normalize}", [pooled.detach(), *torch.autograd.grad(pooled, h, grad)]


def projections(width: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    x = torch.randn(40, width).to(dtype)
    source, target = torch.randint(-1, 3, (2, 40))
    mean = torch.randn(3, width)
    for rank in (0, 5, 32):
        basis = torch.randn(3, width, rank) / max(rank, 1)
        leaf = x.detach().requires_grad_()
        moved = ops.subspace_project(leaf, mean, basis, source, target)
        yield f"projection {rank}", [moved.detach(), *torch.autograd.grad(moved, leaf, x)]
    with torch.no_grad():
        strided = torch.randn(width, 40).to(dtype).T
        yield "projection, strided", [ops.subspace_project(strided, mean, basis, source, target)]


def digests() -> dict[str, str]:
    found = {}
    for width in WIDTHS:
        for dtype in DTYPES:
            torch.manual_seed(0)
            for cases in (norms, pools, projections):
                for name, tensors in cases(width, dtype):
                    digest = hashlib.sha256()
                    for tensor in tensors:
                        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
                    found[f"{name}, {width} x {dtype}"] = digest.hexdigest()
    return found


def run(level: str | None, cache: int) -> dict[str, str]:
    chosen = {} if level is None else {"SHIFCON_CPU_LEVEL": level}
    result = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **chosen, "SHIFCON_CACHE_BYTES": str(cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout)
    assert told.pop("cache_bytes") == cache
    return dict(told)


every_level = pytest.mark.slow("runs the operators again at every instruction level")


@pytest.mark.parametrize("level", [None, *(pytest.param(level, marks=every_level) for level in LEVELS)])
def test_results_past_the_cache_are_the_same_bits(level: str | None, best_level: int) -> None:
    """None: the level of this process."""
    problem = _native.load("cpu")
    if problem is not None:
        pytest.skip(problem)
    if level is not None and LEVELS.index(level) > best_level:
        pytest.skip(f"this processor has no {level}")
    past, inside = run(level, 1), run(level, 2**60)
    assert len(past) > 200
    different = [name for name in past if past[name] != inside[name]]
    assert not different


@pytest.mark.parametrize("size", ["32M", "-1", "0"])
def test_a_cache_of_no_size_is_a_reason_not_to_run(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFCON_CACHE_BYTES", size)
    reason = _native.load.__wrapped__("cpu")  # not what was found before
    assert reason.startswith(f"SHIFCON_CACHE_BYTES: got {size!r}; wanted a whole number of bytes > 0")


def test_the_cache_is_as_large_as_the_system_says() -> None:
    problem = _native.load("cpu")
    if problem is not None:
        pytest.skip(problem)
    if "SHIFCON_CACHE_BYTES" in os.environ:
        pytest.skip("SHIFCON_CACHE_BYTES says how large; run without it")
    sizes = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    if not sizes:
        pytest.skip("this system does not say how large its caches are; Linux does, under /sys")
    largest = max(int(size.strip().removesuffix("K")) * 1024 for size in sizes)
    assert torch.ops.shifcon_fast_cpu.cache_bytes() == largest


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({**digests(), "cache_bytes": torch.ops.shifcon_fast_cpu.cache_bytes()}))
