"""The operators in CUDA graphs, and past the reach of 32-bit offsets; values and gradients are in the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops
from shifcon_fast.ops.registry import OPERATORS

GIB = 2**30


def needs(gib: int) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    if total < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory, this device has {total / GIB:.0f}")


def norm(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, index: Tensor) -> list[Tensor]:
    y, h = ops.add_shift_rms_norm(x, weight, residual, shift, index)
    return [
        y,
        h,
        *torch.autograd.grad([y.float().sin().sum() + h.float().cos().sum()], [x, residual, weight, shift]),
    ]


def pool(h: Tensor, mask: Tensor) -> list[Tensor]:
    means = ops.masked_mean_pool(h, mask, normalize=True)
    return [means, *torch.autograd.grad(means.sin().sum(), h)]


def contrast(a: Tensor, b: Tensor) -> list[Tensor]:
    loss = ops.info_nce(a, b, 20.0, recenter=True).sum() + ops.contrastive_similarity(a, b).sin().sum()
    return [loss, *torch.autograd.grad(loss, [a, b])]


def loss(a: Tensor, b: Tensor) -> list[Tensor]:
    """Few enough rows for one tile a problem, as in training."""
    value = ops.info_nce(a, b, 20.0).sum()
    return [value, *torch.autograd.grad(value, [a, b])]


def project(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor) -> list[Tensor]:
    moved = ops.subspace_project(x, mean, basis, source)
    return [moved, *torch.autograd.grad(moved.float().sin().sum(), x)]


def inputs(case: str, device: torch.device) -> list[Tensor]:
    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    ids = torch.randint(-1, 3, (4,), device=device)
    if case == "norm":
        return [leaf(4, 9, 96), leaf(4, 9, 96), leaf(96), leaf(3, 96, dtype=torch.float32), ids]
    if case == "pool":
        return [leaf(4, 9, 96), torch.rand(4, 9, device=device) > 0.3]
    if case in ("contrast", "loss"):
        rows = 140 if case == "contrast" else 21
        return [leaf(2, rows, 72), leaf(2, rows, 72)]
    mean, basis = torch.randn(3, 96, device=device), torch.linalg.qr(torch.randn(3, 96, 8, device=device))[0]
    return [leaf(4, 9, 96), mean, basis, ids]


CASES: dict[str, Callable[..., list[Tensor]]] = {
    "norm": norm,
    "pool": pool,
    "contrast": contrast,
    "loss": loss,
    "project": project,
}


@pytest.mark.parametrize("case", CASES)
def test_the_chosen_backends_are_the_fast_ones(case, device, only_fast):
    ops.reset_call_counts()
    for result in CASES[case](*inputs(case, device)):
        assert torch.isfinite(result).all()
    assert only_fast(ops.call_counts())


@pytest.mark.parametrize("case", CASES)
def test_one_small_call(case, device, only_fast):
    """Values and every gradient against float64 on the CPU: does this operator work here at all?

    Odd sizes, so that compute-sanitizer, which runs these alone, sees rows and tiles that are not full.
    """
    held = inputs(case, device)
    wide = [
        each.detach().cpu().double().requires_grad_(each.requires_grad)
        if each.is_floating_point()
        else each.cpu()
        for each in held
    ]
    ops.reset_call_counts()
    found = CASES[case](*held)
    assert only_fast(ops.call_counts())
    for got, wanted in zip(found, CASES[case](*wide), strict=True):
        error = (got.detach().cpu().double() - wanted).norm() / wanted.norm()
        assert error < 2e-2, f"{case} is off by {error:.1e}"


def registered_calls(name: str, device: torch.device) -> tuple[Any, ...]:
    """Arguments of a registered operator; those of a backward are what its forward left for it."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    operator = getattr(torch.ops.shifcon_fast, name.removesuffix("_backward")).default
    ids = torch.tensor([1, -1], device=device)
    forward: tuple[Any, ...]
    if name.startswith("add_shift_rms_norm"):
        weight, shift = torch.rand(16, device=device), torch.randn(2, 16, device=device)
        forward = (leaf(2, 3, 16), weight, leaf(2, 3, 16), shift, ids, 1e-6, "gemma", "auto")
        y, h, rstd = operator(*forward)
        upper = (torch.randn_like(y), torch.randn_like(h))
        backward: tuple[Any, ...] = (*upper, h, weight, rstd, ids, 2, "gemma", True, True, True, "auto")
    elif name.startswith("masked_mean_pool"):
        mask = torch.tensor([[1, 0, 1], [0, 0, 0]], device=device)
        forward = (leaf(2, 3, 16), mask, True, "auto")
        pooled, factor = operator(*forward)
        backward = (torch.randn_like(pooled), pooled, factor, mask, torch.bfloat16, True, "auto")
    elif name.startswith("info_nce"):
        a, b = leaf(2, 5, 16), leaf(2, 5, 16)
        forward = (a, b, 5.0, True, True, "auto")
        loss, rows, columns = operator(*forward)
        backward = (torch.randn_like(loss), a, b, rows, columns, 5.0, True, True, True, False, "auto")
    elif name.startswith("contrastive_similarity"):
        a, b = leaf(2, 5, 16), leaf(2, 4, 16)
        forward = (a, b, 5.0, True, False, "auto")
        backward = (torch.randn_like(operator(*forward)), a, b, 5.0, True, False, True, True, "auto")
    else:
        x, mean, basis = (
            leaf(2, 3, 16),
            torch.randn(2, 16, device=device),
            torch.randn(2, 16, 4, device=device),
        )
        forward = (x, mean, basis, ids, None, "auto")
        backward = (leaf(2, 3, 16), x, mean, basis, ids, None, True, True, True, "auto")
    if name.endswith("_backward"):
        return backward
    return tuple(
        v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in forward
    )


@pytest.mark.parametrize("backward", ["", "_backward"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, backward, device, only_fast):
    """Schema, fake shapes and strides, autograd registration and AOT dispatch, on the chosen backend."""
    name = operator + backward
    arguments = registered_calls(name, device)
    ops.reset_call_counts()
    torch.library.opcheck(getattr(torch.ops.shifcon_fast, name).default, arguments)
    assert only_fast(ops.call_counts())


@pytest.mark.parametrize("case", CASES)
def test_a_captured_graph_computes_on_what_its_inputs_hold_when_it_is_replayed(case, cuda):
    """Forward and backward; nothing synchronises, which the capture would refuse."""
    function, held = CASES[case], inputs(case, cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*held)
    for _ in range(2):
        fresh = inputs(case, cuda)
        with torch.no_grad():
            for old, new in zip(held, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        for got, wanted in zip(captured, function(*fresh), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("trainable", [False, True])
def test_the_norm_of_more_than_two_to_the_31_elements_and_its_gradient(trainable, cuda):
    needs(60)
    hidden, rows = 4096, 2**19 + 3
    x = torch.zeros(rows, hidden, device=cuda, dtype=torch.bfloat16)
    x[-1] = torch.randn(hidden, device=cuda)
    weight = torch.rand(hidden, device=cuda, dtype=torch.bfloat16).requires_grad_(trainable)
    upper = torch.zeros_like(x)
    upper[-1] = torch.randn(hidden, device=cuda)

    def gradients(x: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y, _ = ops.add_shift_rms_norm(x, weight)
        leaves = [x, weight] if trainable else [x]
        return (y[-1:].detach(), *torch.autograd.grad(y, leaves, upper))

    y, x_gradient, *rest = gradients(x, upper)
    small_y, small_gradient, *small_rest = gradients(x[-1:].clone(), upper[-1:].clone())
    assert torch.equal(y, small_y)
    assert torch.equal(x_gradient[-1:], small_gradient)
    assert not x_gradient[:-1].any()
    for large, small in zip(rest, small_rest, strict=True):
        torch.testing.assert_close(large, small)


def test_pooling_more_than_two_to_the_31_elements(cuda):
    needs(40)
    batch, length, hidden = 130, 4097, 4096
    h = torch.zeros(batch, length, hidden, device=cuda, dtype=torch.bfloat16)
    h[-1] = torch.randn(length, hidden, device=cuda)
    h.requires_grad_()
    mask = torch.ones(batch, length, device=cuda, dtype=torch.bool)
    means = ops.masked_mean_pool(h, mask)
    upper = torch.zeros_like(means)
    upper[-1] = torch.randn(hidden, device=cuda)
    (gradient,) = torch.autograd.grad(means, h, upper)
    alone = h[-1:].detach().clone().requires_grad_()
    expected = ops.masked_mean_pool(alone, mask[:1])
    (expected_gradient,) = torch.autograd.grad(expected, alone, upper[-1:])
    assert not means[:-1].any()
    torch.testing.assert_close(means[-1:], expected)
    torch.testing.assert_close(gradient[-1:], expected_gradient)


def test_a_similarity_matrix_of_more_than_two_to_the_31_elements(cuda):
    needs(60)
    a, b = torch.randn(2, 1, 46400, 32, device=cuda, dtype=torch.bfloat16)
    similarity = ops.contrastive_similarity(a, b, 5.0)
    assert similarity.numel() > 2**31
    for rows, columns in ((slice(0, 64), slice(0, 64)), (slice(-64, None), slice(-64, None))):
        expected = ops.contrastive_similarity(a[:, rows], b[:, columns], 5.0)
        torch.testing.assert_close(similarity[:, rows, columns], expected, rtol=1e-4, atol=1e-4)
