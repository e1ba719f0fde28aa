"""The compiled contrastive_similarity and info_nce on the CPU, against float64."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from shifcon_fast import _native, ops
from shifcon_fast.ops import registry

if (_missing := _native.load("cpu")) is not None:
    pytest.skip(f"{_missing}; compile it with `pip install -e .`", allow_module_level=True)

LEVELS = list(_native.LEVELS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = list(itertools.product((False, True), repeat=2))  # normalize, recenter
KERNELS = Path(__file__).resolve().parents[2] / "csrc/cpu/kernels"
Options = tuple[float, bool, bool]  # scale, normalize, recenter
Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    """Memory that the extension forgot to write holds NaN (glibc's M_PERTURB fills what malloc returns)."""
    torch.manual_seed(0)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda _option, _value: 0)
    mallopt(-6, 1)
    yield
    mallopt(-6, 0)


def similarity(a: Tensor, b: Tensor, *options: float) -> Tensor:
    return ops.contrastive_similarity(a, b, *options, impl="native")


def loss(a: Tensor, b: Tensor, *options: float) -> Tensor:
    return ops.info_nce(a, b, *options, impl="native")


def plain_similarity(a: Tensor, b: Tensor, scale: float, unit: bool, recenter: bool) -> Tensor:
    if unit:
        a, b = normalize(a, dim=-1), normalize(b, dim=-1)
    if recenter:
        b = b - b.mean(1, keepdim=True) + a.mean(1, keepdim=True)
    return torch.bmm(a, b.mT) * scale


def plain_loss(a: Tensor, b: Tensor, scale: float, unit: bool, recenter: bool) -> Tensor:
    s = plain_similarity(a, b, scale, unit, recenter)
    positive = s.diagonal(dim1=1, dim2=2)
    return ((s.logsumexp(2) - positive) + (s.logsumexp(1) - positive)).mean(1) / 2


PLAIN: dict[Function, Function] = {similarity: plain_similarity, loss: plain_loss}
REFERENCE: dict[Function, Function] = {
    similarity: partial(ops.contrastive_similarity, impl="reference"),
    loss: partial(ops.info_nce, impl="reference"),
}


def pair(
    problems: int, rows: int, columns: int, width: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    a = torch.randn(problems, rows, width)
    noise = torch.randn(problems, columns, width)
    b = a + noise if columns == rows else noise
    return [(part / width**0.25).to(dtype) for part in (a, b)]


def results(
    function: Function,
    inputs: list[Tensor],
    options: Options,
    *,
    upper: Tensor | None = None,
    needed: tuple[bool, bool] = (True, True),
) -> list[Tensor]:
    """What comes out, and the gradients that are needed."""
    leaves = [part.detach().requires_grad_(asks) for part, asks in zip(inputs, needed, strict=True)]
    found = function(*leaves, *options)
    if upper is None:
        upper = torch.linspace(-1, 1.5, found.numel()).reshape(found.shape)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    return [found.detach(), *torch.autograd.grad(found, asked, upper.to(found.dtype))]


def within_rule(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """error(ours) <= 2 × error(plain PyTorch at x's dtype) + half an ulp of the result and four of float32."""
    assert ours.shape == exact.shape
    if exact.numel() == 0:
        return
    error, usual = ((found.double() - exact).abs().max().item() for found in (ours, plain))
    ulps = 4 * torch.finfo(torch.float32).eps + torch.finfo(ours.dtype).eps / 2
    allowed = 2 * usual + ulps * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def check(function: Function, inputs: list[Tensor], options: Options, upper: Tensor | None = None) -> None:
    ours = results(function, inputs, options, upper=upper)
    assert [one.dtype for one in ours] == [torch.float32, inputs[0].dtype, inputs[0].dtype]
    # One number made unit length has no gradient: x / ‖x‖ gives exactly that, x · (1 / ‖x‖) all but an ulp.
    unit_number = options[1] and inputs[0].shape[2] == 1
    usual = results(REFERENCE[function] if unit_number else PLAIN[function], inputs, options, upper=upper)
    exact = results(PLAIN[function], [part.double() for part in inputs], options, upper=upper)
    for one, plain, oracle in zip(ours, usual, exact, strict=True):
        within_rule(one, plain, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "recenter"), MODES)
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_similarity_matches_float64(width: int, unit: bool, recenter: bool, dtype: torch.dtype) -> None:
    for rows, columns in [(1, 1), (2, 5), (5, 2), (33, 64), (65, 33), (130, 65), (64, 130)]:
        check(similarity, pair(2, rows, columns, width, dtype), (3.0, unit, recenter))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "recenter"), MODES)
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_loss_matches_float64(width: int, unit: bool, recenter: bool, dtype: torch.dtype) -> None:
    for rows in (1, 2, 5, 33, 64, 65, 130):
        check(loss, pair(2, rows, rows, width, dtype), (10.0 if unit else 1.0, unit, recenter))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1025, 2047, 2048, 4101])
def test_rows_longer_than_a_panel(width: int, dtype: torch.dtype) -> None:
    """Partial products of panels are added up, of float32 numbers or of bfloat16 pairs."""
    for rows, recenter in itertools.product((5, 64), (False, True)):
        check(loss, pair(2, rows, rows, width, dtype), (20.0, True, recenter))
    check(similarity, pair(2, 9, 34, width, dtype), (3.0, True, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recenter", [False, True])
def test_one_problem_in_stripes(recenter: bool, dtype: torch.dtype) -> None:
    """Several tiles a stripe, and several stripes: partial statistics of the columns are merged."""
    check(loss, pair(1, 700, 700, 20, dtype), (20.0, True, recenter))
    check(similarity, pair(1, 300, 700, 20, dtype), (20.0, True, recenter))


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("rows", [20, 150])
def test_any_scale(rows: int, scale: float) -> None:
    for sign in (1, -1):  # positives far above the negatives, or far below
        a, b = pair(2, rows, rows, 24)
        check(loss, [a, sign * b], (scale, True, False))
        check(loss, [a, sign * a], (scale, True, False))


@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("rows", [33, 130])
def test_errors_of_few_numbers_a_row_over_many_draws(rows: int, width: int) -> None:
    """At scale 100, re-centred: the geometric mean over draws, as a single one hangs on one row.

    The shortest rows hold nearly all of a gradient's error, so that the rule compares two random numbers: plain
    PyTorch with its coordinates reversed misses it now and then.
    """
    ratios = []
    for seed in range(20):
        torch.manual_seed(seed)
        inputs = pair(2, rows, rows, width)
        options = (100.0, True, True)
        exact = results(plain_loss, [part.double() for part in inputs], options)
        errors = []
        for function in (loss, plain_loss):
            found = results(function, inputs, options)
            errors.append(
                [(one.double() - oracle).abs().max() for one, oracle in zip(found, exact, strict=True)]
            )
        ratios.append(torch.tensor([ours / plain for ours, plain in zip(*errors, strict=True)][1:]))
    assert torch.stack(ratios).log().mean().exp() <= 1.25


def test_errors_of_a_gradient_that_is_zero_over_many_draws() -> None:
    """Ones from above, re-centred: what comes out for b is nothing but error; a single draw hangs on luck."""
    ratios = []
    for seed in range(20):
        torch.manual_seed(seed)
        inputs, options, upper = pair(2, 30, 50, 16), (3.0, True, True), torch.ones(2, 30, 50)
        exact = results(plain_similarity, [part.double() for part in inputs], options, upper=upper)
        assert exact[2].abs().max() < 1e-12
        ours, usual = (
            results(function, inputs, options, upper=upper) for function in (similarity, plain_similarity)
        )
        ratios.append(
            [
                ((one.double() - oracle).abs().max() / (plain.double() - oracle).abs().max()).item()
                for one, plain, oracle in zip(ours[1:], usual[1:], exact[1:], strict=True)
            ]
        )
    assert (torch.tensor(ratios).log().mean(0).exp() <= 2).all()


@pytest.mark.parametrize("function", [similarity, loss])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(function: Function, dtype: torch.dtype) -> None:
    a, b = pair(3, 40, 40, 160, dtype)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[..., ::2],
        lambda x: x[..., 80:],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: x[:1].expand(3, 40, 160),
        lambda x: x[:, 1::2],
    ]
    for view, recenter in itertools.product(views, (False, True)):
        ours = results(function, [view(a), view(b)], (5.0, True, recenter))
        dense = results(function, [view(a).contiguous(), view(b).contiguous()], (5.0, True, recenter))
        for one, other in zip(ours, dense, strict=True):
            assert one.is_contiguous()
            assert torch.equal(one, other)


def test_gradients_from_above_of_any_strides() -> None:
    inputs = pair(2, 30, 50, 16)
    uppers = [torch.ones(()).expand(2, 30, 50), torch.randn(2, 50, 30).mT, torch.randn(2, 30, 100)[..., ::2]]
    for upper, recenter in itertools.product(uppers, (False, True)):
        ours = results(similarity, inputs, (3.0, True, recenter), upper=upper)
        dense = results(similarity, inputs, (3.0, True, recenter), upper=upper.contiguous())
        assert all(torch.equal(one, other) for one, other in zip(ours, dense, strict=True))
    for recenter in (False, True):
        check(similarity, inputs, (3.0, True, recenter), uppers[1])
    check(loss, pair(3, 9, 9, 16), (3.0, True, False), torch.tensor(2.0).expand(3))


@pytest.mark.parametrize("function", [similarity, loss])
@pytest.mark.parametrize("rows", [6, 140])
@pytest.mark.parametrize("recenter", [False, True])
def test_a_gradient_for_one_side_only(function: Function, rows: int, recenter: bool) -> None:
    inputs = pair(2, rows, rows, 20)
    _, grad_a, grad_b = results(function, inputs, (5.0, True, recenter))
    assert torch.equal(results(function, inputs, (5.0, True, recenter), needed=(True, False))[1], grad_a)
    assert torch.equal(results(function, inputs, (5.0, True, recenter), needed=(False, True))[1], grad_b)


def test_no_gradient_and_nothing_to_compare() -> None:
    a, b = pair(2, 3, 3, 4)
    native = registry.select("info_nce", "native", a.device, a.dtype)
    _, rows, columns = native.forward(a, b, 1.0, True, True)
    assert native.backward(torch.ones(2), a, b, rows, columns, 1.0, True, True, False, False) == (
        None,
        None,
    )
    for shapes in [((0, 4, 3), (0, 5, 3)), ((2, 0, 3), (2, 5, 3)), ((2, 4, 3), (2, 0, 3))]:
        a, b = torch.randn(shapes[0]), torch.randn(shapes[1])
        found, grad_a, grad_b = results(similarity, [a, b], (2.0, True, True))
        assert found.shape == (shapes[0][0], shapes[0][1], shapes[1][1])
        assert torch.equal(grad_a, torch.zeros_like(a))
        assert torch.equal(grad_b, torch.zeros_like(b))
    empty = torch.randn(0, 4, 3)
    assert [one.shape for one in results(loss, [empty, empty], (2.0, True, True))] == [
        (0,),
        (0, 4, 3),
        (0, 4, 3),
    ]


@pytest.mark.parametrize("function", [similarity, loss])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_row_stays_zero_without_gradient(function: Function, dtype: torch.dtype) -> None:
    for rows in (10, 140):
        a, b = pair(1, rows, rows, 12, dtype)
        a[0, 3] = b[0, 5] = 0
        found, grad_a, grad_b = results(function, [a, b], (2.0, True, False))
        torch.testing.assert_close(found, PLAIN[function](a.float(), b.float(), 2.0, True, False))
        assert grad_a.isfinite().all()
        assert grad_b.isfinite().all()
        assert not grad_a[0, 3].any()
        assert not grad_b[0, 5].any()
        if function is similarity:
            assert not found[0, 3].any()
            assert not found[0, :, 5].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("recenter", [False, True])
def test_what_is_not_finite_stays_in_its_problem_and_row(bad: float, recenter: bool) -> None:
    options = (5.0, True, recenter)
    for rows in (12, 140):
        inputs = pair(3, rows, rows, 20)
        spoilt = [part.clone() for part in inputs]
        spoilt[0][1, 4, 2] = bad
        for function in (similarity, loss):
            clean, dirty = results(function, inputs, options), results(function, spoilt, options)
            for one, other in zip(clean, dirty, strict=True):
                assert torch.equal(one[::2], other[::2])
                assert not torch.isfinite(other[1]).all()
        if not recenter:
            others = torch.arange(rows) != 4
            found = similarity(*spoilt, *options)
            assert not torch.isfinite(found[1, 4]).any()
            assert torch.equal(found[1, others], similarity(*inputs, *options)[1, others])


@pytest.mark.parametrize("function", [similarity, loss])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e25])
def test_rows_of_any_size(function: Function, size: float) -> None:
    """The lengths of the smallest underflow, those of the largest overflow: such rows count as zero."""
    a, b = pair(1, 20, 20, 16)
    ours = results(function, [a * size, b / size if 1e-19 < size < 1e19 else b], (3.0, True, False))
    a_reference = a * size
    usual = results(
        PLAIN[function],
        [
            a.double() * (0 if torch.linalg.vector_norm(a_reference) in (0, float("inf")) else 1),
            b.double(),
        ],
        (3.0, True, False),
    )
    if size == 1e-20:  # the squares have lost most of their digits
        torch.testing.assert_close(ours[0].double(), usual[0], rtol=1e-2, atol=1e-2)
        return
    torch.testing.assert_close(ours[0].double(), usual[0], rtol=1e-5, atol=1e-5)
    assert all(one.isfinite().all() for one in ours)


@pytest.mark.parametrize("function", [similarity, loss])
def test_calls_repeat_bit_for_bit(function: Function) -> None:
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            for rows in (64, 700):
                inputs = pair(2, rows, rows, 40)
                first, second = (results(function, inputs, (20.0, True, True)) for _ in range(2))
                assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize(
    "rows", [4_000, pytest.param(12_000, marks=pytest.mark.slow("multiplies 12,000 rows with as many"))]
)
def test_many_rows_take_little_memory(rows: int) -> None:
    """In bfloat16, forward and backward: the logits alone would be 61 and 549 MiB in float32."""
    script = """
        import resource, sys, torch
        from shifcon_fast import ops
        torch.set_num_threads(2)
        a, b = (torch.randn(int(sys.argv[1]), 256).bfloat16().requires_grad_() for _ in range(2))
        ops.info_nce(a[:512], b[:512], impl="native").backward()  # what PyTorch loads on first use
        a.grad = b.grad = None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss = ops.info_nce(a, b, scale=20.0, recenter=True, impl="native")
        (grad_a,) = torch.autograd.grad(loss, a)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert loss.isfinite() and grad_a.any()
        print((after - before) / 1024)
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(rows)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    gradient = rows * 256 * 2 / 2**20
    assert float(result.stdout) < gradient + 24


BAD_PAIRS = [
    ("wanted .L, N, d.", lambda a: (a[0], a[0])),
    ("b: wanted the dtype of a", lambda a: (a, a[:1])),
    ("b: wanted the dtype of a", lambda a: (a, a[..., :3])),
    ("b: wanted the dtype of a", lambda a: (a, a.half())),
    ("a: float64", lambda a: (a.double(), a.double())),
    ("wanted float32", lambda a: (a.int(), a.int())),
]


@pytest.mark.parametrize(("message", "spoil"), BAD_PAIRS)
@pytest.mark.parametrize("name", ["contrastive_similarity", "info_nce"])
def test_pairs_that_do_not_fit_are_refused(
    name: str, message: str, spoil: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    """By the compiled operators themselves, whoever calls them."""
    library = torch.ops.shifcon_fast_cpu
    with pytest.raises(RuntimeError, match=message):
        getattr(library, name)(*spoil(torch.ones(2, 5, 4)), 1.0, True, False)


def test_arguments_that_do_not_fit_are_refused() -> None:
    library = torch.ops.shifcon_fast_cpu
    a, parts = torch.randn(2, 5, 4), torch.zeros(2, 2, 5)
    for scale in (-1.0, float("inf"), float("nan")):
        for name in ("contrastive_similarity", "info_nce"):
            with pytest.raises(RuntimeError, match="scale: got"):
                getattr(library, name)(a, a, scale, True, False)
    for b in (a[:, :3], a[:, :0]):
        with pytest.raises(RuntimeError, match="b: wanted the shape of a"):
            library.info_nce(a, b, 1.0, True, False)
    for grad in (torch.ones(2, 5, 4), torch.ones(2, 5), torch.ones(2, 5, 5).double()):
        with pytest.raises(RuntimeError, match="grad: wanted"):
            library.contrastive_similarity_backward(grad, a, a, 1.0, True, False, True, True)
    for grad in (torch.ones(3), torch.ones(()), torch.ones(2).half()):
        with pytest.raises(RuntimeError, match="grad: wanted"):
            library.info_nce_backward(grad, a, a, parts, parts, 1.0, True, False, True, True)
    for wrong in (parts[:1], parts[..., :4], parts[:, :1], parts.double()):
        with pytest.raises(RuntimeError, match="row_parts: wanted"):
            library.info_nce_backward(torch.ones(2), a, a, wrong, parts, 1.0, True, False, True, True)
        with pytest.raises(RuntimeError, match="column_parts: wanted"):
            library.info_nce_backward(torch.ones(2), a, a, parts, wrong, 1.0, True, False, True, True)


EXPONENTIALS = """
#include "exp.h"
extern "C" __attribute__((flatten)) void exponentials(const float* x, float* y, int64_t count) {
  using namespace shifcon::SHIFCON_LEVEL;
  for_each_vector(count, [&](int64_t at, int64_t some) {
    store_lanes(y + at, exp_of_negative(load_lanes(x + at, some)), some);
  });
}
"""
_FLAGS = {"baseline": "", "avx2": "-mavx2 -mfma -mf16c"}
_FLAGS["avx512"] = _FLAGS["avx2"] + " -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"


@pytest.mark.parametrize("level", LEVELS[:3])
def test_exponentials_are_within_two_ulps(level: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++; install it to compile kernels/exp.h by itself")
    if LEVELS.index(level) > torch.ops.shifcon_fast_cpu.level():
        pytest.skip(f"this machine, or SHIFCON_CPU_LEVEL, has no {level}")
    (tmp_path / "exp.cpp").write_text(EXPONENTIALS)
    flags = f"-std=c++17 -O2 -shared -fPIC -w -ffp-contract=fast -fno-trapping-math {_FLAGS[level]}"
    command = [
        compiler,
        *flags.split(),
        f"-I{KERNELS}",
        f"-I{KERNELS.parent}",
        f"-DSHIFCON_LEVEL={level}",
        "exp.cpp",
        "-o",
        "exp.so",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    function = ctypes.CDLL(str(tmp_path / "exp.so")).exponentials
    highest = torch.tensor(104.0).view(torch.int32).item()
    magnitudes = torch.arange(0, highest + 1, 257, dtype=torch.int32).view(torch.float32)
    x = torch.cat([-magnitudes, -torch.linspace(0, 104, 1_000_003)])
    special = torch.tensor([0.0, -0.0, -104.1, -1000.0, -3e38, -float("inf"), float("nan"), -1e-45])
    found = [torch.empty_like(values) for values in (x, special)]
    for values, into in zip((x, special), found, strict=True):
        function(
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_void_p(into.data_ptr()),
            ctypes.c_int64(values.numel()),
        )
    exact = x.double().exp()
    exponent = torch.floor(torch.log2(exact)).clamp(min=-126)  # denormals lie 2^-149 apart
    ulp = torch.exp2(exponent - 23)
    assert ((found[0].double() - exact).abs() / ulp).max() <= 2
    assert found[1][:2].tolist() == [1.0, 1.0]
    assert found[1][2:6].tolist() == [0.0] * 4
    assert found[1][6].isnan()
    assert found[1][7] == 1.0


def test_every_level(run_again: Callable[[str], None]) -> None:
    run_again(__file__)
