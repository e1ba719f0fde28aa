"""The compiled ``add_shift_rms_norm``, where ``tests/contract`` leaves something to ask."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from shifcon_fast import _native, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STYLES = ["llama", "gemma", "olmo"]
BITS = {2: torch.int16, 4: torch.int32}

if (problem := _native.load("cpu")) is not None:
    pytest.skip(problem, allow_module_level=True)

NORM, GRADIENTS = (
    getattr(torch.ops.shifcon_fast_cpu, name)
    for name in ("add_shift_rms_norm", "add_shift_rms_norm_backward")
)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(
    leaves: list[Tensor], index: Tensor, upper: tuple[Tensor, Tensor], impl: str, style: str = "llama"
) -> list[Tensor]:
    """y, h and the gradients of x, weight, residual and shift."""
    x, weight, residual, shift = (leaf.detach().requires_grad_() for leaf in leaves)
    y, h = ops.add_shift_rms_norm(x, weight, residual, shift, index, style=style, impl=impl)
    grads = torch.autograd.grad((y, h), (x, weight, residual, shift), upper)
    return [y.detach(), h.detach(), *grads]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, table: torch.dtype) -> list[Tensor]:
    hidden = shape[-1]
    values = [torch.randn(shape), torch.rand(hidden) + 0.5, torch.randn(shape), torch.randn(3, hidden)]
    return [value.to(to) for value, to in zip(values, (dtype, table, dtype, table), strict=True)]


def within(ours: list[Tensor], plain: list[Tensor], oracle: list[Tensor]) -> None:
    """Error at most twice that of the reference, and half an ulp of the result's dtype."""
    for one, usual, exact in zip(ours, plain, oracle, strict=True):
        assert one.dtype == usual.dtype
        assert torch.isfinite(one).all()
        error, allowed = ((t.double() - exact).abs().max().item() for t in (one, usual))
        ulps = 4 * torch.finfo(torch.float32).eps + torch.finfo(one.dtype).eps / 2
        assert error <= 2 * allowed + ulps * max(1.0, exact.abs().max().item())


def float64(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sum_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Every upper half of a float32, lower halves on both sides of a tie and on it; any NaN stays one."""
    upper = torch.arange(2**16)[None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])[:, None]
    sums = (upper | lower).to(torch.int32).view(torch.float32)
    nothing = torch.full(sums.shape, -0.0, dtype=dtype)  # adding it changes no number
    h = ops.add_shift_rms_norm(nothing, torch.ones(2**16), None, sums, torch.arange(6), impl="native")[1]
    expected = sums.to(dtype)
    assert torch.equal(h.isnan(), expected.isnan())
    number = ~expected.isnan()
    bits = BITS[dtype.itemsize]
    assert torch.equal(h[number].view(bits), expected[number].view(bits))


@pytest.mark.parametrize("style", STYLES)
def test_a_weight_of_nan_makes_nan(style: str) -> None:
    """Also where a carry out of its payload would make a number of it."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x3F800000], dtype=torch.int32)
    weight = bits.view(torch.float32).repeat(13)
    y = ops.add_shift_rms_norm(torch.ones(3, 65).bfloat16(), weight, style=style, impl="native")[0]
    assert torch.equal(y.isnan(), weight.isnan().expand(3, 65))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 3, 15, 17, 31, 33, 63, 65, 127, 129, 65_537])
def test_every_remainder_of_a_vector(hidden: int, dtype: torch.dtype) -> None:
    for style in STYLES if hidden < 1000 else ["llama"]:
        leaves, index = inputs((3, 2, hidden), dtype, dtype), torch.tensor([2, -1, 0])
        upper = torch.randn(3, 2, hidden).to(dtype), torch.randn(3, 2, hidden).to(dtype)
        ours, plain = (run(leaves, index, upper, impl, style) for impl in ("native", "reference"))
        oracle = run(float64(leaves), index, (upper[0].double(), upper[1].double()), "reference", style)
        if dtype == torch.float32:
            within(ours, plain, oracle)
        else:  # y and the gradients belong to the h that was rounded, which the reference has bit for bit
            assert torch.equal(ours[1], plain[1])
            for one, usual in zip(ours, plain, strict=True):
                eps = torch.finfo(one.dtype).eps
                torch.testing.assert_close(one, usual, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_every_dtype(dtype: torch.dtype, table: torch.dtype) -> None:
    leaves, index = inputs((4, 3, 37), dtype, table), torch.tensor([2, -1, 0, 1])
    upper = torch.randn(4, 3, 37).to(dtype), torch.randn(4, 3, 37).to(dtype)
    ours, plain = (run(leaves, index, upper, impl) for impl in ("native", "reference"))
    for one, usual in zip(ours, plain, strict=True):
        assert one.dtype == usual.dtype
        eps = max(torch.finfo(t).eps for t in (dtype, one.dtype))
        torch.testing.assert_close(one, usual, rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_every_argument_and_gradient(dtype: torch.dtype) -> None:
    """Ten dimensions that do not merge are more than a kernel has room for; expanded ones repeat."""
    shape = (2,) * 9 + (6,)
    base = torch.randn((3,) * 9 + (13,)).to(dtype)[(slice(0, 2),) * 9]
    wide = base[..., ::2][..., :6]
    assert wide.shape == shape
    index = torch.arange(4).view(2, 2).T % 3 - 1
    leaves = [wide, torch.randn(12).to(dtype)[::2], wide.transpose(0, 8), torch.randn(6, 3).to(dtype).T]
    upper = (
        torch.randn(6).to(dtype).expand(shape),
        torch.randn(1, dtype=torch.float32).to(dtype).expand(shape),
    )
    ours = run(leaves, index, upper, "native")
    expected = run(
        [leaf.contiguous() for leaf in leaves],
        index.contiguous(),
        (upper[0].contiguous(), upper[1].contiguous()),
        "native",
    )
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [5, 64, 67])
def test_rows_without_a_language_keep_every_bit(dtype: torch.dtype, hidden: int) -> None:
    """-0.0, denormals, and NaN with a sign and a payload, which arithmetic would make the one NaN."""
    integers = BITS[dtype.itemsize]
    bits = torch.randint(torch.iinfo(integers).min, torch.iinfo(integers).max, (3, 4, hidden), dtype=integers)
    infinity = torch.tensor(float("inf")).to(dtype).view(integers)
    bits[..., 0], bits[..., 1] = torch.iinfo(integers).min, infinity + 1  # -0.0, and a signalling NaN
    x = bits.view(dtype)
    shift, weight = torch.randn(2, hidden), torch.ones(hidden)
    for index in (torch.tensor([-1, 0, -1]), torch.full((3, 4), -1).int()):
        kept = (index < 0).reshape(index.shape + (1,) * (3 - index.ndim)).expand(x.shape)
        for one in (x, torch.stack([x, x], -1)[..., 0]):
            h = NORM(one, weight, None, shift, index, 1e-6, 0)[1]
            assert torch.equal(h.view(integers)[kept], bits[kept])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    leaves, index = inputs((6, 50), torch.float32, torch.float32), torch.tensor([0, 1, 2, -1, 0, 1])
    upper = torch.randn(6, 50), torch.randn(6, 50)
    expected = run(leaves, index, upper, "native")
    leaves[0][2, 7] = bad
    ours = run(leaves, index, upper, "native")
    others = torch.tensor([0, 1, 3, 4, 5])
    for at in (0, 1, 2, 4):  # y, h, and the gradients of x and residual
        assert torch.equal(ours[at][others], expected[at][others])
    assert not torch.isfinite(ours[0][2]).all()
    assert torch.equal(ours[5][:2], expected[5][:2])  # of shift: the third language alone has that row


@pytest.mark.parametrize("bad", [-2, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_an_id_out_of_range_is_refused_before_anything_is_written(bad: int, integer: torch.dtype) -> None:
    x, shift = torch.randn(4, 8), torch.randn(3, 8)
    index = torch.tensor([0, 1, 2, bad]).to(integer)
    with pytest.raises(ValueError, match="index: got language id"):
        ops.add_shift_rms_norm(x, torch.ones(8), None, shift, index, impl="native")
    with pytest.raises(RuntimeError, match=f"index: got language id {bad}; wanted -1 to 2"):
        NORM(x, torch.ones(8), None, shift, index, 1e-6, 0)
    with pytest.raises(RuntimeError, match=f"index: got language id {bad}; wanted -1 to 2"):
        GRADIENTS(x, None, x, torch.ones(8), torch.ones(4), index, 3, 0, True, True, True)


X, W, IDS = torch.ones(2, 3, 4), torch.ones(4), torch.zeros(2).long()


@pytest.mark.parametrize(
    "call",
    [
        lambda: NORM(X.double(), W, None, None, None, 1e-6, 0),
        lambda: NORM(X.int(), W, None, None, None, 1e-6, 0),
        lambda: NORM(torch.tensor(1.0), W, None, None, None, 1e-6, 0),
        lambda: NORM(X, W[:3], None, None, None, 1e-6, 0),
        lambda: NORM(X, W[None], None, None, None, 1e-6, 0),
        lambda: NORM(X, W, X[:1], None, None, 1e-6, 0),
        lambda: NORM(X, W, X.half(), None, None, 1e-6, 0),
        lambda: NORM(X, W, None, X[0], None, 1e-6, 0),
        lambda: NORM(X, W, None, None, IDS, 1e-6, 0),
        lambda: NORM(X, W, None, torch.ones(2, 3), IDS, 1e-6, 0),
        lambda: NORM(X, W, None, X[0], IDS[:1], 1e-6, 0),
        lambda: NORM(X, W, None, X[0], IDS.float(), 1e-6, 0),
        lambda: NORM(X, W, None, X[0], torch.zeros(2, 3, 4).long(), 1e-6, 0),
        lambda: NORM(X, W, None, None, None, 0.0, 0),
        lambda: NORM(X, W, None, None, None, float("nan"), 0),
        lambda: NORM(X, W, None, None, None, 1e-6, 3),
        lambda: GRADIENTS(None, None, X, W, torch.ones(2, 3), None, 0, 0, True, True, False),
        lambda: GRADIENTS(X[:1], None, X, W, torch.ones(2, 3), None, 0, 0, True, True, False),
        lambda: GRADIENTS(X, None, X, W, torch.ones(2), None, 0, 0, True, True, False),
        lambda: GRADIENTS(X, None, X, W, torch.ones(2, 3).double(), None, 0, 0, True, True, False),
        lambda: GRADIENTS(X, None, X, W, torch.ones(2, 3), None, 2, 0, True, True, True),
    ],
)
def test_arguments_that_do_not_fit_are_refused_below_the_operator_too(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=r"wanted|is for the reference"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_gradient_of_the_weight_over_many_rows(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    x, weight = torch.randn(16_384, 8).to(dtype), torch.rand(8) + 0.5
    upper = torch.rand(16_384, 8).to(dtype)  # of one sign: a sum in one float32 would drift
    found = []
    for impl, to in (
        ("native", dtype),
        ("native", dtype),
        ("reference", dtype),
        ("reference", torch.float64),
    ):
        leaf = weight.to(torch.float64 if to == torch.float64 else torch.float32).requires_grad_()
        y, _ = ops.add_shift_rms_norm(x.to(to), leaf, style="olmo", impl=impl)
        found.append(torch.autograd.grad(y, leaf, upper.to(to))[0])
    assert torch.equal(found[0], found[1])
    within([found[0]], [found[2]], [found[3]])


def test_the_number_of_threads_changes_no_bit_but_the_weights() -> None:
    leaves, index = inputs((64, 700), torch.bfloat16, torch.float32), torch.arange(64) % 4 - 1
    upper = torch.randn(64, 700).bfloat16(), torch.randn(64, 700).bfloat16()
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(run(leaves, index, upper, "native"))
    for other in results[1:]:
        for at in (0, 1, 2, 4, 5):
            assert torch.equal(results[0][at], other[at])
        torch.testing.assert_close(results[0][3], other[3])  # summed in as many parts as there are threads


def test_memory_is_the_results_and_little_more() -> None:
    code = """
import re, torch
from shifcon_fast import _native
_native.load("cpu")
own = torch.ops.shifcon_fast_cpu
norm, gradients = own.add_shift_rms_norm, own.add_shift_rms_norm_backward

def status(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def grown(function):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins again
    before = status("VmRSS")
    result = function()
    return status("VmHWM") - before, result

def run(rows):
    x = torch.empty(rows, 2048, dtype=torch.bfloat16).fill_(1)
    weight, shift, index = torch.ones(2048), torch.ones(3, 2048), torch.arange(rows) % 4 - 1
    forward, (y, h, rstd) = grown(lambda: norm(x, weight, x, shift, index, 1e-6, 0))
    backward, result = grown(lambda: gradients(x, x, h, weight, rstd, index, 3, 0, True, True, True))
    return forward, backward

run(64)
print(*run(8192))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    forward, backward = map(float, told.stdout.split())
    assert 60 < forward < 72  # MiB; x, y and h have 32 each
    assert 28 < backward < 40


def test_every_level(run_again: Callable[[str], None]) -> None:
    run_again(__file__)
