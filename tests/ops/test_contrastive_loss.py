"""info_nce against the written-out symmetric cross entropy in float64, and its memory at N = 12,000."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shifcon_fast import ops
from shifcon_fast.ops.reference import contrastive_loss

OPTIONS = list(itertools.product([False, True], repeat=2))


def plain(a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool) -> Tensor:
    """One (N, d) problem with N × N logits at the dtype of a; the oracle when a is float64."""
    if normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    if recenter:
        b = b - b.mean(0) + a.mean(0)
    logits = scale * a @ b.T
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def plain_problems(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return torch.stack([plain(x, y, **options) for x, y in zip(a, b, strict=True)])


def three_ways(
    a: Tensor, b: Tensor, dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Losses (L,) and gradients of ours, of plain PyTorch at dtype, and of the oracle."""
    upstream = torch.linspace(0.5, 2, len(a))
    losses, gradients = [], []
    for function, to in (
        (ops.info_nce, dtype),
        (plain_problems, dtype),
        (plain_problems, torch.float64),
    ):
        leaves = [v.clone().to(dtype).to(to).requires_grad_() for v in (a, b)]
        loss = function(*leaves, **options)
        loss.backward(upstream.to(loss.dtype))
        losses.append(loss.detach())
        gradients.append([leaf.grad for leaf in leaves])
    return losses, gradients


@pytest.mark.parametrize(("normalize", "recenter"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64(
    within_rule: Callable[..., None], dtype: torch.dtype, normalize: bool, recenter: bool
) -> None:
    for shape, scale in [((3, 13, 24), 20.0), ((1, 1, 5), 1.0), ((2, 2, 1), 3.0), ((2, 64, 33), 1.0)]:
        a = torch.randn(shape)
        b = a + torch.randn(shape)
        losses, gradients = three_ways(a, b, dtype, scale=scale, normalize=normalize, recenter=recenter)
        assert losses[0].dtype == torch.float32
        within_rule(*losses)
        for ours, ordinary, oracle in zip(*gradients, strict=True):
            assert ours.dtype == dtype
            within_rule(ours, ordinary, oracle)


@pytest.mark.parametrize(("normalize", "recenter"), OPTIONS)
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, normalize: bool, recenter: bool) -> None:
    a, b = torch.randn(5, 11, 6), torch.randn(5, 11, 6)
    for tile in (4, 16, 22):  # several tiles a problem; one problem a tile; up to four problems a tile
        monkeypatch.setattr(contrastive_loss, "_TILE", tile)
        losses, gradients = three_ways(a, b, torch.float32, scale=7.0, normalize=normalize, recenter=recenter)
        torch.testing.assert_close(losses[0].double(), losses[2], atol=1e-5, rtol=1e-5)
        for ours, _, oracle in zip(*gradients, strict=True):
            torch.testing.assert_close(ours.double(), oracle, atol=1e-6, rtol=1e-4)


def test_more_rows_than_a_tile() -> None:
    a = torch.randn(1, 1300, 8)
    losses, gradients = three_ways(
        a, a + torch.randn_like(a), torch.float32, scale=10.0, normalize=True, recenter=True
    )
    torch.testing.assert_close(losses[0].double(), losses[2], atol=1e-6, rtol=1e-6)
    for ours, _, oracle in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), oracle, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0, 1e4, 1e30])
@pytest.mark.parametrize("recenter", [False, True])
def test_no_scale_overflows(scale: float, recenter: bool) -> None:
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    loss = ops.info_nce(*leaves, scale=scale, recenter=recenter)
    exact = [a.double().requires_grad_(), b.double().requires_grad_()]
    oracle = plain(*exact, scale, True, recenter)
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=1e-6)
    loss.backward()
    oracle.backward()
    for ours, expected in zip(leaves, exact, strict=True):
        assert ours.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=1e-3, atol=1e-6 * max(scale, 1))
    if scale == 0:
        assert loss.item() == pytest.approx(math.log(6))


def test_two_dimensions_are_one_problem() -> None:
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    loss = ops.info_nce(a, b, scale=3.0)
    assert loss.shape == ()
    assert torch.equal(loss, ops.info_nce(a[None], b[None], scale=3.0)[0])


def test_a_zero_row_gets_no_gradient_and_no_nan() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    a[1] = 0
    a.requires_grad_()
    loss = ops.info_nce(a, b, scale=5.0)
    torch.testing.assert_close(loss.double(), plain(a.detach().double(), b.double(), 5.0, True, False))
    loss.backward()
    assert a.grad is not None
    assert not a.grad[1].any()
    assert a.grad[[0, 2, 3]].any(1).all()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize(("asks_a", "asks_b"), [(True, False), (False, True)])
def test_gradients_only_for_those_that_ask(asks_a: bool, asks_b: bool) -> None:
    a, b = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    both = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    ops.info_nce(*both, scale=4.0, recenter=True).sum().backward()
    one = [a.clone().requires_grad_(asks_a), b.clone().requires_grad_(asks_b)]
    ops.info_nce(*one, scale=4.0, recenter=True).sum().backward()
    for asks, some, every in zip((asks_a, asks_b), one, both, strict=True):
        if asks:
            torch.testing.assert_close(some.grad, every.grad)
        else:
            assert some.grad is None


def test_strides_do_not_matter() -> None:
    a, b = torch.randn(8, 5, 3).permute(2, 1, 0), torch.randn(3, 5, 16)[..., ::2]
    assert torch.equal(ops.info_nce(a, b), ops.info_nce(a.contiguous(), b.contiguous()))


def test_no_problems_at_all() -> None:
    a = torch.zeros(0, 4, 3, requires_grad=True)
    loss = ops.info_nce(a, a)
    assert loss.shape == (0,)
    loss.sum().backward()


@pytest.mark.parametrize(("normalize", "recenter"), OPTIONS)
def test_gradcheck(normalize: bool, recenter: bool) -> None:
    leaves = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: ops.info_nce(a, b, 3.0, normalize, recenter), leaves)


def test_autocast_does_not_lower_the_precision() -> None:
    a, b = torch.randn(9, 32), torch.randn(9, 32)
    a.requires_grad_()
    expected = ops.info_nce(a, b, scale=20.0)
    (expected_grad,) = torch.autograd.grad(expected, a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.info_nce(a, b, scale=20.0)
        (grad,) = torch.autograd.grad(loss, a)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.slow("multiplies 12,000 rows with as many")
def test_twelve_thousand_rows_stay_below_250_mebibytes() -> None:
    """The N × N logits alone would be 549 MiB. Peak memory of a process of its own, forward and backward."""
    script = """
        import resource, torch
        from shifcon_fast import ops
        a, b = (torch.randn(12_000, 32, requires_grad=True) for _ in range(2))
        ops.info_nce(a[:64], b[:64]).backward()  # what PyTorch loads on first use is not the operator's
        a.grad = b.grad = None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss = ops.info_nce(a, b, scale=20.0, recenter=True)
        loss.backward()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert loss.isfinite() and a.grad.any() and b.grad.any()
        print((after - before) / 1024)
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 250


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"b": torch.ones(3, 2)},
            ValueError,
            r"b: got shape \(3, 2\) next to a's \(2, 2\); wanted equal shapes",
        ),
        ({"a": torch.ones(0, 2), "b": torch.ones(0, 2)}, ValueError, r"with at least one row"),
        ({"b": torch.ones(2, 3)}, ValueError, r"b: got shape \(2, 3\); wanted 2 dimensions that agree"),
        ({"a": torch.ones(2)}, ValueError, r"a: got shape \(2,\); wanted \(N, d\) or \(L, N, d\)"),
        (
            {"b": torch.ones(2, 2).half()},
            TypeError,
            r"b: got dtype torch.float16; wanted a's dtype torch.float32",
        ),
        (
            {"b": torch.ones(2, 2, device="meta")},
            ValueError,
            r"b: got a tensor on meta; wanted it on a's",
        ),
        ({"scale": -1.0}, ValueError, r"scale: got -1.0; wanted a finite number >= 0"),
        ({"scale": float("inf")}, ValueError, r"scale: got inf"),
        ({"scale": float("nan")}, ValueError, r"scale: got nan"),
        ({"scale": torch.ones(())}, TypeError, r"scale: got Tensor; wanted a Python float"),
        ({"impl": "cuda"}, ValueError, r"impl: got 'cuda'; wanted 'auto'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.info_nce(**{"a": torch.ones(2, 2), "b": torch.ones(2, 2), **arguments})
