"""``masked_mean_pool``: what every backend has to keep."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ErrorRule = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture
def impl(backend: Callable[..., str]) -> str:
    return backend("masked_mean_pool")


def mean(h: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Plain PyTorch, at h's dtype."""
    selected = (mask != 0).unsqueeze(-1)
    count = selected.sum(1).clamp(min=1)
    pooled = torch.where(selected, h, 0).sum(1) / count
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "shape", [pytest.param((3, 5, 7), marks=pytest.mark.small), (2, 150, 300), (1, 1, 1), (4, 9, 1030)]
)
def test_values_and_gradient(
    shape: tuple[int, int, int],
    normalize: bool,
    dtype: torch.dtype,
    impl: str,
    device: torch.device,
    within_rule: ErrorRule,
) -> None:
    values = torch.randn(shape, device=device).to(dtype)
    mask = torch.rand(shape[:2], device=device) > 0.4
    mask[:, 0] = True
    h = values.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()  # what is masked is never read
    upper = torch.randn(shape[0], shape[2], device=device)
    pooled = ops.masked_mean_pool(h, mask, normalize, impl=impl)
    (grad,) = torch.autograd.grad(pooled, h, upper)
    assert pooled.dtype == torch.float32
    expected = {}
    for name, wide in (("plain", dtype), ("oracle", torch.float64)):
        leaf = values.to(wide).requires_grad_()
        own = mean(leaf, mask, normalize)
        expected[name] = own, torch.autograd.grad(own, leaf, upper.to(wide))[0]
    within_rule(pooled.detach(), expected["plain"][0], expected["oracle"][0])
    within_rule(grad, expected["plain"][1], expected["oracle"][1])
    assert not grad[~mask].any()


@pytest.mark.parametrize(
    "integer", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
def test_any_mask_dtype_left_padding_and_holes(integer: torch.dtype, impl: str, device: torch.device) -> None:
    h = torch.arange(2 * 6 * 20, device=device).view(2, 6, 20).float()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1]], device=device).to(integer)
    expected = torch.stack([h[0, 2:].mean(0), h[1, [0, 2, 5]].mean(0)])
    torch.testing.assert_close(ops.masked_mean_pool(h, mask, impl=impl), expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_an_empty_row_gives_zeros_and_no_gradient(normalize: bool, impl: str, device: torch.device) -> None:
    h = torch.randn(3, 4, 10, device=device)
    h[1] = 0  # a zero mean has no direction
    h.requires_grad_()
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], device=device)
    pooled = ops.masked_mean_pool(h, mask, normalize, impl=impl)
    (grad,) = torch.autograd.grad(pooled, h, torch.randn(3, 10, device=device))
    assert not pooled[:2].any()
    assert not grad[0].any()
    assert torch.isfinite(grad).all()
    assert grad[1].any() != normalize
    assert grad[2, 1].any()


def test_zero_tokens_and_zero_rows(impl: str, device: torch.device) -> None:
    for shape in ((2, 0, 6), (0, 3, 6)):
        h = torch.randn(shape, device=device, requires_grad=True)
        pooled = ops.masked_mean_pool(h, torch.ones(shape[:2], device=device).bool(), True, impl=impl)
        assert torch.equal(pooled, torch.zeros(shape[0], 6, device=device))
        assert torch.autograd.grad(pooled.sum(), h)[0].shape == shape


@pytest.mark.parametrize("layout", ["sliced tokens", "transposed", "strided columns"])
def test_non_contiguous_inputs(layout: str, impl: str, device: torch.device) -> None:
    base = torch.randn(5, 6, 64, device=device)
    h = {
        "sliced tokens": base[:, 1:4],
        "transposed": base.transpose(0, 1),
        "strided columns": base[:, :, ::2],
    }[layout].detach()
    mask = (torch.rand(h.shape[1], h.shape[0], device=device) > 0.3).T
    upper = torch.randn(h.shape[2], h.shape[0], device=device).T
    results = []
    for leaf, own_mask in ((h, mask), (h.contiguous(), mask.contiguous())):
        leaf.requires_grad_()
        pooled = ops.masked_mean_pool(leaf, own_mask, True, impl=impl)
        results.append([pooled, torch.autograd.grad(pooled, leaf, upper)[0]])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
