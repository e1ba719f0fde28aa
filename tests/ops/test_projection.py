"""subspace_project against the formula applied row by row in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops


def plain(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor | None = None) -> Tensor:
    """x' = mean[t] + V_t V_tᵀ (x - mean[s]), one row at a time, at the dtype of x."""
    mean, basis = mean.to(x.dtype), basis.to(x.dtype)
    target = source if target is None else target
    shape = x.shape[:-1]
    from_, to = (
        i.long().reshape(i.shape + (1,) * (len(shape) - i.ndim)).expand(shape) for i in (source, target)
    )
    rows = []
    for row, s, t in zip(
        x.reshape(-1, x.shape[-1]), from_.flatten().tolist(), to.flatten().tolist(), strict=True
    ):
        kept = s < 0 or t < 0
        rows.append(row if kept else mean[t] + basis[t] @ (basis[t].T @ (row - mean[s])))
    return torch.stack(rows).reshape(x.shape) if rows else x


def languages(
    count: int, hidden: int, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    basis = torch.linalg.qr(torch.randn(count, hidden, max(rank, 1), dtype=torch.float64)).Q[..., :rank]
    return torch.randn(count, hidden).to(dtype), basis.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64(within_rule: Callable[..., None], dtype: torch.dtype) -> None:
    for shape, rank in [((3, 4, 24), 5), ((1, 1), 1), ((7, 33), 0), ((0, 8), 2), ((2, 3, 2, 9), 9)]:
        mean, basis = languages(4, shape[-1], rank)
        x = torch.randn(shape).to(dtype)
        source, target = torch.randint(-1, 4, shape[:-1]), torch.randint(-1, 4, shape[:-1])
        for to in (None, target):
            ours = ops.subspace_project(x, mean, basis, source, to)
            assert ours.dtype == dtype
            exact = plain(x.double(), mean.double(), basis.double(), source, to)
            within_rule(ours, plain(x, mean, basis, source, to), exact)


def test_a_full_basis_leaves_the_shift_of_the_means() -> None:
    """V_t = I is ShifCon's own shift: x + mean[t] - mean[s]."""
    x, mean = torch.randn(2, 3, 6), torch.randn(2, 6)
    basis = torch.eye(6).expand(2, 6, 6)
    moved = ops.subspace_project(x, mean, basis, torch.tensor([0, 1]), torch.tensor([1, 1]))
    torch.testing.assert_close(moved[0], x[0] + mean[1] - mean[0])
    torch.testing.assert_close(moved[1], x[1])


def test_projecting_twice_is_projecting_once() -> None:
    mean, basis = languages(3, 16, 4)
    x, source = torch.randn(10, 16), torch.randint(0, 3, (10,))
    once = ops.subspace_project(x, mean, basis, source)
    assert (once - x).abs().max() > 0.1
    torch.testing.assert_close(ops.subspace_project(once, mean, basis, source), once, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_id_minus_one_stay_bit_for_bit(dtype: torch.dtype) -> None:
    mean, basis = languages(2, 4, 2)
    x = torch.randn(4, 4).to(dtype)
    x[:2, 0] = torch.tensor([-0.0, float("nan")]).to(dtype)
    source = torch.tensor([-1, 0, -1, 0], dtype=torch.int32)
    target = torch.tensor([0, -1, -1, 1], dtype=torch.int32)
    moved = ops.subspace_project(x, mean, basis, source, target)
    integers = {2: torch.int16, 4: torch.int32}[x.element_size()]
    assert torch.equal(moved[:3].view(integers), x[:3].view(integers))
    assert not torch.equal(moved[3], x[3])


def test_nan_stays_in_its_row() -> None:
    mean, basis = languages(2, 4, 2)
    x = torch.randn(3, 4)
    clean = ops.subspace_project(x, mean, basis, torch.tensor(1))
    x[1, 2] = float("nan")
    poisoned = ops.subspace_project(x, mean, basis, torch.tensor(1))
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])
    assert poisoned[1].isnan().all()


def test_index_per_row_of_the_batch() -> None:
    mean, basis = languages(3, 8, 2)
    x, source = torch.randn(2, 5, 8), torch.tensor([2, -1])
    spread = source[:, None].expand(2, 5)
    assert torch.equal(
        ops.subspace_project(x, mean, basis, source), ops.subspace_project(x, mean, basis, spread)
    )


def test_gradients_for_every_subset_that_asks() -> None:
    mean, basis = languages(3, 8, 2)
    values, upstream = [torch.randn(2, 5, 8), mean, basis], torch.randn(2, 5, 8)
    source, target = torch.randint(-1, 3, (2, 5)), torch.randint(-1, 3, (2, 5))
    for asks in itertools.product([False, True], repeat=3):
        if not any(asks):
            continue
        results = []
        for function, dtype in ((ops.subspace_project, torch.float32), (plain, torch.float64)):
            leaves = [v.clone().to(dtype).requires_grad_(ask) for v, ask in zip(values, asks, strict=True)]
            function(*leaves, source, target).backward(upstream.to(dtype))
            results.append([leaf.grad for leaf in leaves])
        for ours, oracle in zip(*results, strict=True):
            assert (ours is None) == (oracle is None)
            if ours is not None:
                torch.testing.assert_close(ours.double(), oracle, atol=1e-5, rtol=1e-5)


def test_gradients_in_16_bits(within_rule: Callable[..., None]) -> None:
    mean, basis = languages(3, 32, 4)
    values, upstream = [torch.randn(12, 32), mean, basis], torch.randn(12, 32).bfloat16()
    source, target = torch.randint(-1, 3, (12,)), torch.randint(-1, 3, (12,))
    results = []
    for function, dtype in (
        (ops.subspace_project, torch.bfloat16),
        (plain, torch.bfloat16),
        (plain, torch.float64),
    ):
        leaves = [v.clone().bfloat16().to(dtype).requires_grad_() for v in values]
        function(*leaves, source, target).backward(upstream.to(dtype))
        results.append([leaf.grad for leaf in leaves])
    for ours, ordinary, oracle in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        within_rule(ours, ordinary, oracle)


def test_gradcheck() -> None:
    mean, basis = languages(3, 5, 2, torch.float64)
    leaves = [
        v.double().requires_grad_() for v in (torch.randn(2, 3, 5), mean, basis + torch.randn(3, 5, 2) / 9)
    ]
    source, target = torch.tensor([[0, 1, 2], [-1, 1, 1]]), torch.tensor([[2, 1, 0], [0, -1, 2]])
    assert torch.autograd.gradcheck(lambda *v: ops.subspace_project(*v, source, target), leaves)
    assert torch.autograd.gradcheck(lambda *v: ops.subspace_project(*v, source[:, 1]), leaves)


def test_strides_do_not_matter() -> None:
    mean, basis = languages(3, 8, 2)
    x, source = torch.randn(8, 5, 4).permute(2, 1, 0), torch.randint(-1, 3, (5, 4)).T
    for tables in ((mean, basis), (mean.T.contiguous().T, basis.mT.contiguous().mT)):
        ours = ops.subspace_project(x, *tables, source)
        dense = ops.subspace_project(x.contiguous(), mean, basis, source.contiguous())
        torch.testing.assert_close(ours, dense)
        assert ours.is_contiguous()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(2, 3).int()}, TypeError, r"x: got dtype torch.int32"),
        ({"mean": torch.ones(4, 5)}, ValueError, r"mean: got shape \(4, 5\); wanted \(languages, 3\)"),
        ({"basis": torch.ones(3, 3, 1)}, ValueError, r"basis: got shape \(3, 3, 1\); wanted \(4, 3, k\)"),
        ({"source": torch.zeros(2)}, TypeError, r"source: got dtype torch.float32; wanted int64 or int32"),
        ({"source": torch.zeros(3).long()}, ValueError, r"source: got shape \(3,\); wanted a prefix"),
        ({"source": torch.tensor([0, 4])}, ValueError, r"source: got language id 4; wanted 0 to 3"),
        ({"target": torch.tensor([-2, 0])}, ValueError, r"target: got language id -2; wanted 0 to 3, or -1"),
        ({"target": torch.tensor(0)}, ValueError, r"target: got shape \(\); wanted source's shape \(2,\)"),
        ({"mean": torch.ones(4, 3, device="meta")}, ValueError, r"mean: got a tensor on meta"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"x": torch.ones(2, 3), "mean": torch.ones(4, 3), "basis": torch.ones(4, 3, 1)}
    with pytest.raises(error, match=message):
        ops.subspace_project(**{**good, "source": torch.tensor([0, 1]), **arguments})
