"""The compiled subspace_project on the CPU, against float64: shapes, strides, ids, gradients, levels."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from shifcon_fast import _native, ops
from shifcon_fast.ops.reference import projection as reference

if (_missing := _native.load("cpu")) is not None:
    pytest.skip(f"{_missing}; compile it with `pip install -e .`", allow_module_level=True)

LEVELS = list(_native.LEVELS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    *((1, 0), (1, 1), (7, 0), (7, 1), (7, 3), (7, 7), (64, 3), (64, 16), (64, 64)),
    *((1000, 1), (1000, 16), (1000, 64), (300, 100)),
]
Tables = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    """Memory that the extension forgot to write holds NaN (glibc's M_PERTURB fills what malloc returns)."""
    torch.manual_seed(0)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda _option, _value: 0)
    mallopt(-6, 1)
    yield
    mallopt(-6, 0)


def languages(count: int, hidden: int, rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    basis = torch.linalg.qr(torch.randn(count, hidden, max(rank, 1), dtype=torch.float64)).Q[..., :rank]
    return scale * torch.randn(count, hidden), basis.float()


def forward(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor | None = None) -> Tensor:
    return ops.subspace_project(x, mean, basis, source, target, impl="native")


def some_gradients(
    grad: Tensor, x: Tensor | None, tables: Tables, ids: Tables, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    backend = ops.registry.select("subspace_project", "native", grad.device, grad.dtype)
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = backend.backward(
        grad, x, *tables, *ids, *needs
    )
    return found


def backward(grad: Tensor, x: Tensor, tables: Tables, ids: Tables) -> Gradients:
    grad_x, grad_mean, grad_basis = some_gradients(grad, x, tables, ids, (True, True, True))
    assert grad_x is not None
    assert grad_mean is not None
    assert grad_basis is not None
    return grad_x, grad_mean, grad_basis


def within_rule(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """error(ours) <= 2 × error(plain PyTorch at x's dtype) + half an ulp of the result and four of float32."""
    assert ours.shape == exact.shape
    if exact.numel() == 0:
        return
    error, usual = ((found.double() - exact).abs().max().item() for found in (ours, plain))
    ulps = 4 * torch.finfo(torch.float32).eps + torch.finfo(ours.dtype).eps / 2
    allowed = 2 * usual + ulps * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def plain(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The formula in PyTorch, tables cast to the dtype of x, one language at a time."""
    result = x.clone()
    moves = (source >= 0) & (target >= 0)
    for language in target[moves].unique().tolist():
        rows = ((target == language) & moves).nonzero().squeeze(-1)
        directions = basis[language].to(x.dtype)
        centred = x[rows] - mean[source[rows]].to(x.dtype)
        result[rows] = centred @ directions @ directions.T + mean[language].to(x.dtype)
    return result


def plain_gradient(grad: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return plain(grad, basis.new_zeros(basis.shape[:2]), basis, source, target)


def check(x: Tensor, grad: Tensor, tables: Tables, ids: Tables) -> None:
    """Forward and all gradients by the rule.

    Plain PyTorch is the reference backend, which multiplies in float32. Products of bfloat16 rows may be in
    bfloat16; there it is the formula in that dtype.
    """
    mean, basis = (table.double() for table in tables)
    exact = reference.forward(x.double(), mean, basis, *ids)
    narrow = x.dtype == torch.bfloat16
    usual = plain(x, *tables, *ids) if narrow else reference.forward(x, *tables, *ids)
    within_rule(forward(x, *tables, *ids), usual, exact)
    found = backward(grad, x, tables, ids)
    usual_grads = list(reference.backward(grad, x, *tables, *ids, True, True, True))
    if narrow:
        usual_grads[0] = plain_gradient(grad, tables[1], *ids)
    oracle = reference.backward(grad.double(), x.double(), mean, basis, *ids, True, True, True)
    for ours, other, right in zip(found, usual_grads, oracle, strict=True):
        assert other is not None
        assert right is not None
        assert ours.dtype == other.dtype
        within_rule(ours, other, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "rank"), SHAPES)
def test_matches_float64(hidden: int, rank: int, dtype: torch.dtype) -> None:
    tables = languages(4, hidden, rank)
    for rows in (1, 5, 131):
        x, grad = torch.randn(2, rows, hidden).to(dtype)
        check(x, grad, tables, (torch.randint(-1, 4, (rows,)), torch.randint(-1, 4, (rows,))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_a_panel_holds(dtype: torch.dtype) -> None:
    tables = languages(3, 130, 9)
    x, grad = torch.randn(2, 1500, 130).to(dtype)
    for source in (torch.zeros(1500).long(), torch.arange(1500) % 3, torch.full((1500,), -1)):
        check(x, grad, tables, (source, torch.ones_like(source)))
        check(x, grad, tables, (source, source))


def test_one_language_has_every_row_or_none() -> None:
    tables = languages(1, 64, 3)
    x, grad = torch.randn(2, 40, 64)
    check(x, grad, tables, (torch.zeros(40).long(),) * 2)
    check(x[:0], grad[:0], tables, (torch.zeros(0).long(),) * 2)
    kept = torch.full((40,), -1)
    assert torch.equal(forward(x, *tables, kept), x)
    grad_x, grad_mean, grad_basis = backward(grad, x, tables, (kept, kept))
    assert torch.equal(grad_x, grad)
    assert not grad_mean.any()
    assert not grad_basis.any()


def test_empty_tables_and_rows() -> None:
    tables = languages(2, 8, 2)
    assert forward(torch.empty(0, 3, 8), *tables, torch.empty(0).long()).shape == (0, 3, 8)
    assert forward(torch.empty(3, 0, 8), *tables, torch.zeros(3).long()).shape == (3, 0, 8)
    kept = torch.full((5,), -1)
    x = torch.randn(5, 8)
    assert torch.equal(forward(x, torch.empty(0, 8), torch.empty(0, 8, 2), kept), x)
    found = backward(x, x, (torch.empty(0, 8), torch.empty(0, 8, 2)), (kept, kept))
    assert [gradient.shape for gradient in found] == [(5, 8), (0, 8), (0, 8, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    mean, basis = languages(3, 40, 6)
    x, grad = torch.randn(2, 5, 4, 80).to(dtype)
    source, target = torch.randint(-1, 3, (2, 5, 4))
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[..., ::2],
        lambda x: x[..., 40:],
        lambda x: x[..., :40].transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[..., :40].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: x[:1, :1, :40].expand(5, 4, 40),
        lambda x: x[..., :1].expand(5, 4, 40),
    ]
    tables: list[Tables] = [
        (mean, basis),
        (mean.T.contiguous().T, basis.mT.contiguous().mT),
        (mean.double(), basis.half()),
        (mean.bfloat16(), basis.double()),
        (mean[:1].expand(3, 40), basis[:, :, :1].expand(3, 40, 6)),
        (mean.half().T.contiguous().T, basis.bfloat16().mT.contiguous().mT),
    ]
    for view, of_tables in itertools.product(views, tables):
        dense = (of_tables[0].contiguous(), of_tables[1].contiguous())
        ids = (source.T.contiguous().T, target.int())
        ours = forward(view(x), *of_tables, ids[0], ids[1].long())
        assert ours.is_contiguous()
        assert torch.equal(ours, forward(view(x).contiguous(), *dense, source, target))
        found = backward(view(grad), view(x), of_tables, ids)
        expected = backward(view(grad).contiguous(), view(x).contiguous(), dense, (source, target))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("table", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "rank"), [(1, 1), (9, 33), (70, 37), (131, 16), (300, 100)])
def test_no_layout_of_the_basis_changes_a_bit(
    hidden: int, rank: int, dtype: torch.dtype, table: torch.dtype
) -> None:
    """By rows, by columns (torch.linalg.qr returns that), by language, apart, in part."""
    mean, basis = torch.randn(3, hidden), torch.randn(3, hidden, rank).to(table)
    x, grad = torch.randn(2, 50, hidden).to(dtype)
    ids = (torch.randint(-1, 3, (50,)), torch.randint(-1, 3, (50,)))
    layouts = [
        basis.mT.contiguous().mT,
        basis.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        basis.repeat_interleave(2, -1)[..., ::2],
        basis.mT.repeat_interleave(3, -1)[..., ::3].mT,
        torch.cat([basis, basis], -1)[..., rank:],
    ]
    expected = (forward(x, mean, basis, *ids), *backward(grad, x, (mean, basis), ids))
    for layout in layouts:
        found = (forward(x, mean, layout, *ids), *backward(grad, x, (mean, layout), ids))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_bfloat16_products_where_the_level_says_so(table: torch.dtype) -> None:
    """c, V and the coefficients are rounded once each at the level avx512_bf16, and not below it."""
    mean, basis = languages(2, 300, 33)
    basis = basis.to(table)
    x = torch.randn(60, 300).bfloat16()
    source, target = torch.randint(0, 2, (2, 60))

    def projected(rows: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        directions = rounded(basis)[target]
        coefficients = torch.einsum("nd,ndk->nk", rounded(rows), directions)
        return torch.einsum("nk,ndk->nd", rounded(coefficients), directions)

    for found, rows, shift in (
        (forward(x, mean, basis, source, target), x - mean[source], mean[target]),
        (backward(x, x, (mean, basis), (source, target))[0], x, torch.zeros(1)),
    ):
        pairs, wide = (
            (found.double() - shift.double() - projected(rows, rounded)).norm()
            for rounded in (lambda v: v.bfloat16().double(), lambda v: v.double())
        )
        assert (pairs < wide) == (LEVELS[torch.ops.shifcon_fast_cpu.level()] == "avx512_bf16")


def test_ids_of_either_width_per_token_or_per_row_of_the_batch() -> None:
    tables = languages(3, 16, 4)
    x, grad = torch.randn(2, 6, 7, 16)
    source, target = torch.randint(-1, 3, (2, 6))
    wide = [index[:, None].expand(6, 7) for index in (source, target)]
    ours, ours_grads = forward(x, *tables, source, target), backward(grad, x, tables, (source, target))
    for ids in (wide, [index.int() for index in wide], [source.int(), target.int()]):
        assert torch.equal(forward(x, *tables, ids[0], ids[1]), ours)
        for one, other in zip(backward(grad, x, tables, (ids[0], ids[1])), ours_grads, strict=True):
            assert torch.equal(one, other)
    everywhere = torch.tensor(2)
    assert torch.equal(forward(x, *tables, everywhere), forward(x, *tables, torch.full((6, 7), 2)))


def test_every_subset_of_gradients_is_the_same() -> None:
    tables = languages(3, 70, 5)
    x, grad = torch.randn(2, 90, 70)
    ids = (torch.randint(-1, 3, (90,)), torch.randint(-1, 3, (90,)))
    everything = backward(grad, x, tables, ids)
    for needs in itertools.product((False, True), repeat=3):
        asked = (needs[0], needs[1], needs[2])
        some = some_gradients(grad, x if needs[2] else None, tables, ids, asked)
        for needed, one, other in zip(needs, some, everything, strict=True):
            assert (one is not None) == needed
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_far_larger_than_the_spread(dtype: torch.dtype) -> None:
    """Were V_tᵀ mean taken from V_tᵀ x, the difference would drown in rounding."""
    mean, basis = languages(3, 256, 16, scale=1000.0)
    source, target = torch.randint(0, 3, (2, 200))
    x = (mean[source] + torch.randn(200, 256)).to(dtype)
    check(x, torch.randn(200, 256).to(dtype), (mean, basis), (source, target))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row_and_language(dtype: torch.dtype, bad: float) -> None:
    tables = languages(3, 40, 5)
    x, grad = torch.randn(2, 60, 40).to(dtype)
    source, target = torch.arange(60) % 2, torch.arange(60) // 4 % 2
    source[50:] = target[50:] = 2
    clean, clean_grads = forward(x, *tables, source, target), backward(grad, x, tables, (source, target))
    x[55, 3] = grad[55, 3] = bad
    spoilt, spoilt_grads = forward(x, *tables, source, target), backward(grad, x, tables, (source, target))
    others = torch.arange(60) != 55
    assert torch.equal(spoilt[others], clean[others])
    assert not torch.isfinite(spoilt[55]).any()
    assert torch.equal(spoilt_grads[0][others], clean_grads[0][others])
    for spoilt_grad, clean_grad in zip(spoilt_grads[1:], clean_grads[1:], strict=True):
        assert torch.equal(spoilt_grad[:2], clean_grad[:2])
        assert not torch.isfinite(spoilt_grad[2]).all()


def test_odd_bits_pass_through() -> None:
    tables = languages(2, 5, 2)
    x = torch.tensor([[-0.0, float("nan"), -float("nan"), 1e-40, float("inf")]]).repeat(3, 1)
    x.view(torch.int32)[:, 1] = 0x7FA00001  # a signalling NaN with a payload
    for values in (x, x.repeat(1, 2)[:, ::2]):
        kept = forward(values, *tables, torch.tensor([-1, 0, -1]), torch.tensor([0, -1, -1]))
        assert torch.equal(kept.view(torch.int32), values.contiguous().view(torch.int32))


@pytest.mark.parametrize("function", ["forward", "backward"])
@pytest.mark.parametrize("which", ["source", "target"])
@pytest.mark.parametrize("bad", [-2, 3, 2**40, -(2**62)])
def test_ids_out_of_range_are_refused(function: str, which: str, bad: int) -> None:
    """By the compiled operator itself, whoever calls it: a guard page would not catch every wild read."""
    tables = languages(3, 8, 2)
    x = torch.randn(4, 8)
    ids = {"source": torch.zeros(4).long(), "target": torch.zeros(4).long()}
    ids[which][3] = bad
    library = torch.ops.shifcon_fast_cpu
    with pytest.raises(RuntimeError, match=f"{which}: got language id {bad}"):
        if function == "forward":
            library.subspace_project(x, *tables, *ids.values())
        else:
            library.subspace_project_backward(x, x, *tables, *ids.values(), True, True, True)
    with pytest.raises(ValueError, match=f"{which}: got language id {bad}"):
        ops.subspace_project(x, *tables, ids["source"], ids["target"])


def test_arguments_that_do_not_fit_are_refused() -> None:
    mean, basis = languages(3, 8, 2)
    x, ids = torch.randn(4, 8), torch.zeros(4).long()
    library = torch.ops.shifcon_fast_cpu
    bad: list[tuple[str, tuple[Tensor, ...]]] = [
        ("mean: wanted", (x, mean[:, :7], basis, ids, ids)),
        ("mean: wanted", (x, mean[0], basis, ids, ids)),
        ("basis: wanted", (x, mean, basis[:2], ids, ids)),
        ("basis: wanted", (x, mean, basis[:, :7], ids, ids)),
        ("basis: wanted", (x, mean, basis[0], ids, ids)),
        ("source: wanted a prefix", (x, mean, basis, ids[:3], ids[:3])),
        ("source: wanted int64", (x, mean, basis, ids.float(), ids)),
        ("target: wanted source's shape", (x, mean, basis, ids, ids[0])),
        ("x: float64", (x.double(), mean, basis, ids, ids)),
        ("mean: wanted float32", (x, mean.int(), basis, ids, ids)),
    ]
    for message, arguments in bad:
        with pytest.raises(RuntimeError, match=message):
            library.subspace_project(*arguments)
    for other in (None, x[:3], x.half(), x[:, :7]):
        with pytest.raises(RuntimeError, match="x: wanted"):
            library.subspace_project_backward(x, other, mean, basis, ids, ids, False, False, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    tables = languages(5, 200, 20)
    x, grad = torch.randn(2, 2000, 200).to(dtype)
    ids = (torch.randint(-1, 5, (2000,)), torch.randint(-1, 5, (2000,)))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        try:
            results.append((forward(x, *tables, *ids), *backward(grad, x, tables, ids)))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        for one, again in zip(results[0], other, strict=True):
            assert torch.equal(one, again)


def test_every_level(run_again: Callable[[str], None]) -> None:
    run_again(__file__)
