"""masked_mean_pool against float64, with any mask and with poison under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops

MASKS = {
    "right padding": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    "left padding": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 0, 0]],
    "an empty row": [[0, 0, 0, 0, 0], [0, 1, 1, 0, 1]],
}


def plain(h: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Row by row, at the dtype of h; the oracle when h is float64."""
    rows = []
    for row, selected in zip(h, mask.bool(), strict=True):
        mean = row[selected].mean(0) if selected.any() else row[:0].sum(0)
        rows.append(mean / mean.norm() if normalize and mean.any() else mean)
    return torch.stack(rows)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8])
def test_matches_float64(
    within_rule: Callable[..., None], mask: Any, normalize: bool, dtype: torch.dtype, mask_dtype: torch.dtype
) -> None:
    mask, upstream = torch.tensor(mask).to(mask_dtype), torch.randn(2, 7)
    h = torch.randn(2, 5, 7).to(dtype)
    outputs, gradients = [], []
    for function, to in (
        (ops.masked_mean_pool, dtype),
        (plain, dtype),
        (plain, torch.float64),
    ):
        leaf = h.clone().to(to).requires_grad_()
        outputs.append(function(leaf, mask, normalize))
        outputs[-1].backward(upstream.to(outputs[-1].dtype))
        gradients.append(leaf.grad)
    assert outputs[0].dtype == torch.float32
    assert gradients[0].dtype == dtype
    within_rule(*outputs)
    within_rule(*gradients)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nothing_under_the_mask_leaks(normalize: bool, poison: float) -> None:
    mask = torch.tensor(MASKS["holes"] + [[0] * 5])
    clean = torch.randn(3, 5, 7)
    poisoned = torch.where(mask.bool()[..., None], clean, poison)
    results = []
    for h in (clean, poisoned):
        leaf = h.clone().requires_grad_()
        pooled = ops.masked_mean_pool(leaf, mask, normalize)
        pooled.square().sum().mul(0.5).add(pooled.sum()).backward()
        results.append((pooled.detach(), leaf.grad))
    for expected, ours in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    assert not results[1][0][2].any()
    assert not results[1][1][mask == 0].any()


def test_sixteen_bits_accumulate_in_float32() -> None:
    h = torch.full((1, 4096, 2), 1.0).bfloat16()
    h[0, 0] = 257 - 1  # 256 + 4,095 ones: accumulated in bfloat16 the ones would vanish
    pooled = ops.masked_mean_pool(h, torch.ones(1, 4096, dtype=torch.bool))
    assert pooled.eq((256 + 4095) / 4096).all()


def test_a_zero_mean_stays_zero_when_normalised() -> None:
    h = torch.tensor([[[1.0, -2.0], [-1.0, 2.0]], [[3.0, 4.0], [3.0, 4.0]]], requires_grad=True)
    pooled = ops.masked_mean_pool(h, torch.ones(2, 2, dtype=torch.bool), normalize=True)
    torch.testing.assert_close(pooled, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    pooled.sum().backward()
    assert h.grad is not None
    assert not h.grad[0].any()
    assert h.grad[1].any()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 1, 1), (3, 2, 129)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    h = torch.randn(shape, requires_grad=True)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    pooled = ops.masked_mean_pool(h, mask)
    torch.testing.assert_close(
        pooled.double(), plain(h.double(), mask, False).detach() if shape[0] else pooled.double()
    )
    assert pooled.shape == (shape[0], shape[2])
    pooled.sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(h.grad, torch.full(shape, 1 / max(shape[1], 1)))


def test_strides_do_not_matter() -> None:
    h, mask = torch.randn(7, 5, 4).transpose(0, 2), torch.tensor(MASKS["holes"] * 2).repeat(1, 2)[:, ::2]
    assert torch.equal(ops.masked_mean_pool(h, mask), ops.masked_mean_pool(h.contiguous(), mask.contiguous()))


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool) -> None:
    h = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(MASKS["holes"])
    assert torch.autograd.gradcheck(lambda h: ops.masked_mean_pool(h, mask, normalize), (h,))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"h": torch.ones(2, 4)}, ValueError, r"h: got shape \(2, 4\); wanted \(batch, tokens, hidden\)"),
        ({"h": torch.ones(2, 3, 4).long()}, TypeError, r"h: got dtype torch.int64; wanted float32"),
        ({"mask": torch.ones(2, 3)}, TypeError, r"mask: got dtype torch.float32; wanted a bool or integer"),
        ({"mask": None}, TypeError, r"mask: got NoneType; wanted a bool or integer tensor"),
        ({"mask": torch.ones(2, 4).bool()}, ValueError, r"mask: got shape \(2, 4\); wanted .* \(2, 3\)"),
        ({"mask": torch.ones(2, 3, device="meta").bool()}, ValueError, r"mask: got a tensor on meta"),
        ({"impl": "triton"}, ValueError, r"impl: got 'triton', which cannot run masked_mean_pool on cpu"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.masked_mean_pool(**{"h": torch.ones(2, 3, 4), "mask": torch.ones(2, 3).bool(), **arguments})
