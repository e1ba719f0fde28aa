"""``contrastive_similarity`` and ``info_nce``: what every backend has to keep."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from shifcon_fast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = list(itertools.product((False, True), repeat=2))  # normalize, recenter
ErrorRule = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture
def impl(backend: Callable[..., str]) -> str:
    return backend("info_nce", "contrastive_similarity")


def logits(a: Tensor, b: Tensor, scale: float, unit: bool, recenter: bool) -> Tensor:
    """Plain PyTorch, at a's dtype."""
    if unit:
        a, b = normalize(a, dim=-1), normalize(b, dim=-1)
    if recenter:
        b = b - b.mean(1, keepdim=True) + a.mean(1, keepdim=True)
    return torch.bmm(a, b.mT) * scale


def loss(a: Tensor, b: Tensor, scale: float, unit: bool, recenter: bool) -> Tensor:
    s = logits(a, b, scale, unit, recenter)
    positive = s.diagonal(dim1=1, dim2=2)
    return ((s.logsumexp(2) - positive) + (s.logsumexp(1) - positive)).mean(1) / 2


def pair(shape: tuple[int, int, int], columns: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    a = torch.randn(shape, device=device)
    noise = torch.randn(shape[0], columns, shape[2], device=device)
    b = a + noise if columns == shape[1] else noise
    return [(part / shape[2] ** 0.25).to(dtype) for part in (a, b)]


def check(
    function: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    options: tuple[float, bool, bool],
    rule: ErrorRule,
    impl: str,
    needed: tuple[bool, bool] = (True, True),
) -> None:
    leaves = [t.detach().clone().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    ours = function(*leaves, *options, impl=impl)
    upper = torch.randn(ours.shape, device=ours.device)
    found = [ours.detach(), *torch.autograd.grad(ours, asked, upper)]
    assert found[0].dtype == torch.float32
    expected = []
    for dtype in (inputs[0].dtype, torch.float64):
        own = [t.detach().to(dtype).requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
        value = plain(*own, *options)
        gradients = torch.autograd.grad(value, [t for t in own if t.requires_grad], upper.to(value.dtype))
        expected.append([value.detach(), *gradients])
    for one, plain_one, oracle in zip(found, *expected, strict=True):
        rule(one, plain_one, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "recenter"), MODES)
@pytest.mark.parametrize(
    ("shape", "columns"), [pytest.param((2, 5, 7), 9, marks=pytest.mark.small), ((1, 140, 70), 130)]
)
def test_similarity(
    shape: tuple[int, int, int],
    columns: int,
    unit: bool,
    recenter: bool,
    dtype: torch.dtype,
    impl: str,
    device: torch.device,
    within_rule: ErrorRule,
) -> None:
    inputs = pair(shape, columns, dtype, device)
    check(ops.contrastive_similarity, logits, inputs, (3.0, unit, recenter), within_rule, impl)


# N = 1, 6, 33, 100 take one tile; 150 and 300 several.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "recenter"), MODES)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 3),
        (2, 6, 9),
        pytest.param((1, 33, 40), marks=pytest.mark.small),
        (2, 100, 20),
        (1, 150, 70),
    ],
)
def test_loss(
    shape: tuple[int, int, int],
    unit: bool,
    recenter: bool,
    dtype: torch.dtype,
    impl: str,
    device: torch.device,
    within_rule: ErrorRule,
) -> None:
    inputs = pair(shape, shape[1], dtype, device)
    check(ops.info_nce, loss, inputs, (10.0 if unit else 1.0, unit, recenter), within_rule, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_problems_of_several_tiles(
    dtype: torch.dtype, impl: str, device: torch.device, within_rule: ErrorRule
) -> None:
    check(ops.info_nce, loss, pair((2, 300, 16), 300, dtype, device), (20.0, True, False), within_rule, impl)


@pytest.mark.parametrize("scale", [0.0, 1.0, 39.0, 41.0, 100.0, 1000.0])
@pytest.mark.parametrize("count", [20, 150])
def test_any_scale(scale: float, count: int, impl: str, device: torch.device, within_rule: ErrorRule) -> None:
    """Up to 40 the scale itself is the maximum of the sums; beyond, that would underflow."""
    check(
        ops.info_nce,
        loss,
        pair((1, count, 24), count, torch.float32, device),
        (scale, True, False),
        within_rule,
        impl,
    )


@pytest.mark.parametrize("count", [40, 140])
def test_well_separated_and_opposite_rows(
    count: int, impl: str, device: torch.device, within_rule: ErrorRule
) -> None:
    """Positives far above the negatives (tiny gradients), and far below them (large losses)."""
    a = torch.randn(1, count, 64, device=device)
    for sign in (1, -1):
        check(ops.info_nce, loss, [a, sign * a], (100.0, True, False), within_rule, impl)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@pytest.mark.parametrize("recenter", [False, True])
@pytest.mark.parametrize("count", [12, 140])
def test_a_gradient_for_one_side_only(
    needed: tuple[bool, bool],
    recenter: bool,
    count: int,
    impl: str,
    device: torch.device,
    within_rule: ErrorRule,
) -> None:
    inputs = pair((2, count, 20), count, torch.float32, device)
    check(ops.info_nce, loss, inputs, (5.0, True, recenter), within_rule, impl, needed)
    check(ops.contrastive_similarity, logits, inputs, (5.0, True, recenter), within_rule, impl, needed)


@pytest.mark.parametrize("count", [10, 140])
def test_a_zero_row_stays_zero_without_gradient(count: int, impl: str, device: torch.device) -> None:
    a, b = pair((1, count, 12), count, torch.float32, device)
    a[0, 3] = 0
    a.requires_grad_(), b.requires_grad_()
    similarity = ops.contrastive_similarity(a, b, 2.0, impl=impl)
    assert not similarity[0, 3].any()
    for result in (similarity.square().sum(), ops.info_nce(a, b, 2.0, impl=impl).sum()):
        grad_a, grad_b = torch.autograd.grad(result, (a, b))
        assert not grad_a[0, 3].any()
        assert torch.isfinite(grad_a).all()
        assert grad_b.abs().sum() > 0


def test_one_problem_without_its_axis_and_non_contiguous_inputs(impl: str, device: torch.device) -> None:
    a, b = pair((3, 20, 30), 20, torch.bfloat16, device)
    views = a.transpose(0, 1).contiguous().transpose(0, 1), b[:, :, :].mT.contiguous().mT
    expected = ops.info_nce(a, b, 7.0, impl=impl)
    assert torch.equal(ops.info_nce(*views, 7.0, impl=impl), expected)
    torch.testing.assert_close(ops.info_nce(a[1], b[1], 7.0, impl=impl), expected[1])
    torch.testing.assert_close(
        ops.contrastive_similarity(a[1], b[1], impl=impl),
        ops.contrastive_similarity(a, b, impl=impl)[1],
    )


def test_no_problems_and_no_columns(impl: str, device: torch.device) -> None:
    empty = torch.randn(0, 4, 8, device=device, requires_grad=True)
    assert ops.info_nce(empty, empty, impl=impl).shape == (0,)
    a = torch.randn(2, 3, 8, device=device, requires_grad=True)
    none = torch.randn(2, 0, 8, device=device)
    similarity = ops.contrastive_similarity(a, none, impl=impl)
    assert similarity.shape == (2, 3, 0)
    assert torch.equal(torch.autograd.grad(similarity.sum(), a)[0], torch.zeros_like(a))
