"""A loss whose gradient is taken early: the same gradients, in the one backward, and nothing held until then."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from shifcon_fast.objective.early_gradient import can_go_early, with_gradient_now


def test_gradients_join_the_backward_of_the_sum_as_they_would_have() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c, unused = (torch.randn(3, generator=generator).requires_grad_() for _ in range(4))
    weights = [a, b, c, unused]

    def losses() -> tuple[Tensor, Tensor]:
        return (a * b).sum().exp(), (b * c).square().sum()

    first, second = losses()
    (0.3 * first + 2 * second).backward()
    expected = [None if each.grad is None else each.grad.clone() for each in weights]
    for each in weights:
        each.grad = None
    first, _ = losses()
    early = with_gradient_now(first, weights)
    assert torch.equal(early, first)
    assert all(each.grad is None for each in weights)
    (0.3 * early + 2 * losses()[1]).backward()
    for each, wanted in zip(weights, expected, strict=True):
        assert (each.grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(each.grad, wanted)
    with pytest.raises(RuntimeError, match="called twice"):
        early.backward()


def test_its_activations_are_freed_at_once() -> None:
    weight = torch.ones(4, requires_grad=True)
    held = weight * 2
    kept = weakref.ref(held)
    loss = held.square().sum()
    del held
    assert kept() is None or loss.grad_fn is not None
    saved: list[weakref.ref[Tensor]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = (weight * 2).sin().sum()
    early = with_gradient_now(loss, [weight])
    del loss
    gc.collect()
    assert saved
    assert all(each() is None or each() is weight for each in saved)
    early.backward()
    torch.testing.assert_close(weight.grad, 2 * torch.cos(torch.full((4,), 2.0)))


def test_a_loss_without_weights_has_no_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    assert not with_gradient_now(other.sum(), [weight]).requires_grad


def test_hooks_and_sharded_weights_are_left_to_the_backward() -> None:
    class Sharded(nn.Parameter):
        pass

    weight = nn.Parameter(torch.ones(2))
    assert can_go_early([weight])
    assert not can_go_early([weight, Sharded(torch.ones(2))])
    weight.register_hook(lambda gradient: gradient)
    assert not can_go_early([weight])
