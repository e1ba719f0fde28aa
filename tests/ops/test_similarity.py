"""contrastive_similarity against float64, and as the logits of info_nce."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shifcon_fast import ops

OPTIONS = list(itertools.product([False, True], repeat=2))


def plain(a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool) -> Tensor:
    if normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    if recenter:
        b = b - b.mean(-2, keepdim=True) + a.mean(-2, keepdim=True)
    return scale * a @ b.mT


@pytest.mark.parametrize(("normalize", "recenter"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64(
    within_rule: Callable[..., None], dtype: torch.dtype, normalize: bool, recenter: bool
) -> None:
    for rows, columns, hidden in [(5, 9, 24), (1, 1, 1), (3, 1, 129)]:
        values = torch.randn(2, rows, hidden), torch.randn(2, columns, hidden)
        upstream = torch.randn(2, rows, columns)
        outputs, gradients = [], []
        for function, to in (
            (ops.contrastive_similarity, dtype),
            (plain, dtype),
            (plain, torch.float64),
        ):
            leaves = [v.clone().to(dtype).to(to).requires_grad_() for v in values]
            outputs.append(function(*leaves, 5.0, normalize, recenter))
            outputs[-1].backward(upstream.to(outputs[-1].dtype))
            gradients.append([leaf.grad for leaf in leaves])
        assert outputs[0].dtype == torch.float32
        within_rule(*outputs)
        for ours, ordinary, oracle in zip(*gradients, strict=True):
            assert ours.dtype == dtype
            within_rule(ours, ordinary, oracle)


def test_is_what_info_nce_is_taken_over() -> None:
    a, b = torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    logits = ops.contrastive_similarity(a, b, scale=20.0, recenter=True)
    target = torch.arange(7).expand(3, 7)
    rows = F.cross_entropy(logits.mT, target, reduction="none").mean(1)  # classes on dimension 1
    columns = F.cross_entropy(logits, target, reduction="none").mean(1)
    torch.testing.assert_close((rows + columns) / 2, ops.info_nce(a, b, scale=20.0, recenter=True))


def test_two_dimensions_are_one_problem() -> None:
    a, b = torch.randn(4, 8), torch.randn(6, 8)
    logits = ops.contrastive_similarity(a, b)
    assert logits.shape == (4, 6)
    assert torch.equal(logits, ops.contrastive_similarity(a[None], b[None])[0])
    torch.testing.assert_close(logits[1, 2], F.cosine_similarity(a[1], b[2], dim=0))


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0)])
def test_empty_sides(rows: int, columns: int) -> None:
    a, b = torch.randn(2, rows, 4, requires_grad=True), torch.randn(2, columns, 4, requires_grad=True)
    logits = ops.contrastive_similarity(a, b, recenter=True)
    assert logits.shape == (2, rows, columns)
    logits.sum().backward()
    for leaf in (a, b):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize(("asks_a", "asks_b"), [(True, False), (False, True)])
def test_gradients_only_for_those_that_ask(asks_a: bool, asks_b: bool) -> None:
    a, b, upstream = torch.randn(2, 6, 4), torch.randn(2, 3, 4), torch.randn(2, 6, 3)
    both = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    ops.contrastive_similarity(*both, recenter=True).backward(upstream)
    one = [a.clone().requires_grad_(asks_a), b.clone().requires_grad_(asks_b)]
    ops.contrastive_similarity(*one, recenter=True).backward(upstream)
    for asks, some, every in zip((asks_a, asks_b), one, both, strict=True):
        if asks:
            assert torch.equal(some.grad, every.grad)
        else:
            assert some.grad is None


def test_strides_do_not_matter() -> None:
    a, b = torch.randn(8, 5, 3).permute(2, 1, 0), torch.randn(3, 4, 16)[..., ::2]
    dense = ops.contrastive_similarity(a.contiguous(), b.contiguous())
    assert torch.equal(ops.contrastive_similarity(a, b), dense)


@pytest.mark.parametrize(("normalize", "recenter"), OPTIONS)
def test_gradcheck(normalize: bool, recenter: bool) -> None:
    a = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b: ops.contrastive_similarity(a, b, 3.0, normalize, recenter), (a, b)
    )


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"b: got shape \(3, 2, 4\); wanted 3 dimensions that agree with a's"
    ):
        ops.contrastive_similarity(torch.ones(2, 2, 4), torch.ones(3, 2, 4))
    with pytest.raises(ValueError, match=r"scale: got -2; wanted a finite number"):
        ops.contrastive_similarity(torch.ones(2, 4), torch.ones(2, 4), scale=-2)
    with pytest.raises(TypeError, match=r"a: got list"):
        ops.contrastive_similarity([1.0], torch.ones(2, 4))  # type: ignore[arg-type]
