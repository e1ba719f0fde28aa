"""The compiled ``masked_mean_pool``, where ``tests/contract`` leaves something to ask."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from shifcon_fast import _native, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

if (problem := _native.load("cpu")) is not None:
    pytest.skip(problem, allow_module_level=True)

POOL, GRADIENT = (
    getattr(torch.ops.shifcon_fast_cpu, name) for name in ("masked_mean_pool", "masked_mean_pool_backward")
)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def both(h: Tensor, mask: Tensor, upper: Tensor, impl: str, normalize: bool = True) -> tuple[Tensor, Tensor]:
    leaf = h.detach().requires_grad_()
    pooled = ops.masked_mean_pool(leaf, mask, normalize, impl=impl)
    return pooled.detach(), torch.autograd.grad(pooled, leaf, upper)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "hidden"), [(1, 700, 5000), (3, 9, 2049), (2, 3000, 65)])
def test_the_cut_into_units_of_work_does_not_change_a_bit(
    batch: int, tokens: int, hidden: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Rows are cut into blocks of columns, and their gradients into runs of tokens, where rows are few."""
    torch.manual_seed(0)
    h, mask = torch.randn(batch, tokens, hidden).to(dtype), torch.rand(batch, tokens) > 0.3
    upper = torch.randn(batch, hidden)
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(both(h, mask, upper, "native"))
    for one, other in ((0, 1), (0, 2)):
        assert all(map(torch.equal, results[one], results[other]))
    expected = both(h.double(), mask, upper.double(), "reference")
    plain = both(h, mask, upper, "reference")
    for ours, usual, oracle in zip(results[0], plain, expected, strict=True):
        allowed = 2 * (usual - oracle).abs().max() + 4 * torch.finfo(ours.dtype).eps * oracle.abs().max()
        assert (ours - oracle).abs().max() <= allowed


def test_the_error_does_not_grow_with_the_number_of_tokens() -> None:
    """A sum of 100,000 numbers of one sign, added one after the other, would be off by 1e-4 and more."""
    torch.manual_seed(0)
    h = torch.rand(1, 100_000, 3)
    pooled = ops.masked_mean_pool(h, torch.ones(1, 100_000).bool(), impl="native")
    torch.testing.assert_close(pooled.double(), h.double().mean(1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("integer", [torch.int16, torch.int32, torch.int64])
def test_a_number_whose_low_byte_is_zero_selects(integer: torch.dtype) -> None:
    h = torch.arange(12.0).view(1, 4, 3)
    mask = torch.tensor([[0, torch.iinfo(integer).min, 256, 0]]).to(integer)
    assert torch.equal(ops.masked_mean_pool(h, mask, impl="native"), h[:, 1:3].mean(1))


def test_masks_of_any_strides() -> None:
    torch.manual_seed(0)
    h, base = torch.randn(4, 6, 10), torch.rand(12, 8) > 0.4
    for mask in (base[::2, ::2].T, base[::3, 1:7], base[:1, :6].expand(4, 6), base[:4, :1].expand(4, 6)):
        for integer in (torch.bool, torch.int64):
            found = ops.masked_mean_pool(h, mask.to(integer, copy=False), impl="native")
            assert torch.equal(found, ops.masked_mean_pool(h, mask.contiguous(), impl="native"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width_stride", [1, 2, 0])
def test_what_is_masked_is_not_read_whatever_the_strides(dtype: torch.dtype, width_stride: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 20, 33).to(dtype)
    mask = torch.rand(2, 20) > 0.5
    poisoned = values.masked_fill(~mask.unsqueeze(-1), float("nan"))
    if width_stride == 2:
        values, poisoned = (torch.stack([t, t], -1).flatten(2)[..., ::2] for t in (values, poisoned))
    elif width_stride == 0:
        values, poisoned = (t[..., :1].expand(2, 20, 33) for t in (values, poisoned))
    upper = torch.randn(2, 33)
    for ours, expected in zip(
        both(poisoned, mask, upper, "native"), both(values, mask, upper, "native"), strict=True
    ):
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(bad: float) -> None:
    torch.manual_seed(0)
    h, mask = torch.randn(3, 40, 70), torch.ones(3, 40).bool()
    expected = ops.masked_mean_pool(h, mask, impl="native")
    h[1, 7, 66] = bad
    pooled = ops.masked_mean_pool(h, mask, impl="native")
    assert not torch.isfinite(pooled[1, 66])
    pooled[1, 66] = expected[1, 66]
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("normalize", [False, True])
def test_nothing_to_pool(shape: tuple[int, int, int], normalize: bool) -> None:
    h, mask = torch.randn(shape).bfloat16(), torch.ones(shape[:2]).bool()
    pooled, factor = POOL(h, mask, normalize)
    assert torch.equal(pooled, torch.zeros(shape[0], shape[2]))
    assert factor.shape == shape[:1]
    grad = GRADIENT(torch.ones_like(pooled), pooled, factor, mask, torch.bfloat16, normalize)
    assert grad.shape == shape
    assert grad.dtype == torch.bfloat16


def test_gradients_of_any_dtype_and_strides() -> None:
    torch.manual_seed(0)
    h, mask = torch.randn(4, 5, 6), torch.rand(4, 5) > 0.3
    pooled, factor = POOL(h, mask, True)
    upper = torch.randn(6, 8)[:, ::2].T
    expected = GRADIENT(upper.contiguous(), pooled, factor, mask, torch.float32, True)
    assert torch.equal(GRADIENT(upper, pooled, factor, mask, torch.float32, True), expected)
    apart = pooled.T.contiguous().T, torch.stack([factor, factor], 1)[:, 0]
    assert torch.equal(GRADIENT(upper, *apart, mask, torch.float32, True), expected)
    assert torch.equal(GRADIENT(upper.double(), pooled.double(), factor, mask, torch.float32, True), expected)


H, MASK, ONES, FACTOR = torch.ones(2, 3, 4), torch.ones(2, 3).bool(), torch.ones(2, 4), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: POOL(H[0], MASK, True), "h: wanted"),
        (lambda: POOL(H.double(), MASK, True), "float64 is for the reference"),
        (lambda: POOL(H.int(), MASK, True), "h: wanted"),
        (lambda: POOL(H, MASK.float(), True), "mask: wanted bool or integers"),
        (lambda: POOL(H, MASK[:1], True), "mask: wanted the first two sizes"),
        (lambda: POOL(H, MASK[:, :2], True), "mask: wanted the first two sizes"),
        (lambda: POOL(H, MASK[0], True), "mask: wanted"),
        (lambda: GRADIENT(ONES[:1], ONES, FACTOR, MASK, torch.float32, True), "grad: wanted"),
        (lambda: GRADIENT(ONES, ONES[:, :2], FACTOR, MASK, torch.float32, True), "pooled: wanted"),
        (lambda: GRADIENT(ONES, ONES, FACTOR[:1], MASK, torch.float32, True), "factor: wanted"),
        (lambda: GRADIENT(ONES, ONES, FACTOR.double(), MASK, torch.float32, True), "factor: wanted"),
        (lambda: GRADIENT(ONES, ONES, FACTOR, MASK, torch.float64, True), "float64 is for the reference"),
        (lambda: GRADIENT(ONES, ONES, FACTOR, MASK, torch.int32, True), "dtype: wanted"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_below_the_operator_too(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_memory_is_the_results_and_little_more() -> None:
    code = """
import re, torch
from shifcon_fast import _native
_native.load("cpu")
pool, gradient = torch.ops.shifcon_fast_cpu.masked_mean_pool, torch.ops.shifcon_fast_cpu.masked_mean_pool_backward

def status(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def grown(function):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins again
    before = status("VmRSS")
    result = function()
    return status("VmHWM") - before, result

def run(h):
    mask = torch.ones(h.shape[:2]).bool()
    forward, (pooled, factor) = grown(lambda: pool(h, mask, True))
    backward, result = grown(lambda: gradient(pooled, pooled, factor, mask, h.dtype, True))
    return forward, backward

run(torch.randn(4, 64, 2048).bfloat16())
print(*run(torch.empty(32, 512, 2048, dtype=torch.bfloat16).fill_(1)))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    forward, backward = map(float, told.stdout.split())
    assert forward < 4  # MiB; h has 64
    assert 60 < backward < 72


def test_every_level(run_again: Callable[[str], None]) -> None:
    run_again(__file__)
