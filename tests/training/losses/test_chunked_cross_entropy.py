"""The loss from hidden states and the plain one against float64: value and gradients, for each kind of head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from shifcon_fast.training.losses import chunked_cross_entropy as room
from shifcon_fast.training.losses import liger
from shifcon_fast.training.losses.chunked_cross_entropy import Finish, chunked_cross_entropy, way

TOKENS, WIDTH, VOCABULARY = 150, 64, 320
BY_TORCH = "torch" if hasattr(functional, "linear_cross_entropy") else "autograd"  # before torch 2.13

Dtype = torch.dtype


def plain_head(bias: bool, dtype: Dtype) -> nn.Module:
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    return head.requires_grad_(False)


def quantised_head(dtype: Dtype) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    head = bnb.nn.Linear4bit(WIDTH, VOCABULARY, bias=False, compute_dtype=dtype, quant_type="nf4").to("cpu")
    head.support_avx512bf16_for_cpu = False
    return head.to(dtype).requires_grad_(False)


def head_with_adapter(dtype: Dtype) -> nn.Module:
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    return LoraLinear(
        plain_head(False, dtype), "default", config=lora, r=4, lora_alpha=8, init_lora_weights=False
    )


HEADS: dict[str, tuple[Callable[[Dtype], nn.Module], Finish]] = {
    "frozen": (lambda dtype: plain_head(False, dtype), Finish()),
    "bias": (lambda dtype: plain_head(True, dtype), Finish()),
    "trained": (lambda dtype: plain_head(True, dtype).requires_grad_(), Finish()),
    "softcap": (lambda dtype: plain_head(False, dtype), Finish(softcap=5.0)),
    "scale": (lambda dtype: plain_head(True, dtype), Finish(scale=0.25)),
    "odd scale": (lambda dtype: plain_head(True, dtype), Finish(scale=1 / 6, softcap=30.0)),
    "adapter": (head_with_adapter, Finish()),
    "4-bit": (quantised_head, Finish()),
}


def case(name: str, dtype: Dtype) -> tuple[nn.Module, Finish, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    make, finish = HEADS[name]
    head = make(dtype)
    hidden = (3 * torch.randn(TOKENS, WIDTH)).to(dtype)
    return head, finish, hidden, torch.randint(0, VOCABULARY, (TOKENS,)), torch.randint(-1, 3, (TOKENS,))


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    wanted = [hidden, *(each for each in head.parameters() if each.requires_grad)]
    return [each.double() for each in torch.autograd.grad(0.37 * loss, wanted)]


def plain(head: nn.Module, finish: Finish, hidden: Tensor, targets: Tensor, dtype: Dtype) -> Any:
    """As transformers has it: logits of all, in float32."""
    hidden = hidden.clone().requires_grad_()
    logits = finish(head(hidden))
    losses = functional.cross_entropy(logits.to(dtype), targets, reduction="none")
    return losses.detach().double(), gradients(losses.sum(), hidden, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_no_further_from_float64_than_twice_the_plain_loss(
    name: str, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "IN_PLACE", 48 * VOCABULARY)  # several chunks, the last of them smaller
    monkeypatch.setattr(room, "_KEPT", 48 * VOCABULARY)
    monkeypatch.setattr(room, "_TOKENS_OF_A_GROUP", 16)
    head, finish, hidden, targets, groups = case(name, dtype)
    theirs, their_gradients = plain(head, finish, hidden, targets, torch.float32)
    leaf = hidden.clone().requires_grad_()
    found = chunked_cross_entropy(head, leaf, targets, groups, finish)
    our_gradients = gradients(found.total, leaf, head)
    total = found.total.detach().double()
    oracle = copy.deepcopy(head).double()
    if name == "4-bit":  # which has float64 nowhere
        weight = head(torch.eye(WIDTH, dtype=dtype)).T.double()
        oracle = nn.Linear(WIDTH, VOCABULARY, bias=False).double().requires_grad_(False)
        oracle.weight.copy_(weight)
    exact, exact_gradients = plain(oracle, finish, hidden.double(), targets, torch.float64)

    def error(ours: Tensor, right: Tensor) -> float:
        return float((ours - right).norm() / right.norm())

    floor = 4 * torch.finfo(torch.float32).eps  # of sums that cancel by luck
    assert error(total, exact.sum()) <= 2 * error(theirs.sum(), exact.sum()) + floor
    for ours, other, right in zip(our_gradients, their_gradients, exact_gradients, strict=True):
        assert error(ours, right) <= 2 * error(other, right) + floor
    by_group = {int(each): float(exact[groups == each].sum()) for each in groups.unique()}
    if found.nll is not None:
        sums = {each: float(found.nll[groups == each].sum()) for each in by_group}
        assert error(found.nll.double(), exact) <= 2 * error(theirs, exact) + floor
        assert way(head, leaf, finish) == "autograd"
    else:
        assert way(head, leaf, finish) == "torch"
        assert found.groups is not None
        sums = dict(zip(found.groups.tolist(), found.sums.tolist(), strict=True))
        assert found.counts.tolist() == [int((groups == each).sum()) for each in by_group]
    assert sums == pytest.approx(by_group, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_which_way_a_head_goes() -> None:
    ways = {}
    for name in HEADS:
        head, finish, hidden, *_ = case(name, torch.float32)
        ways[name] = way(head, hidden, finish)
    direct = {"frozen", "bias", "scale"}
    assert ways == {name: BY_TORCH if name in direct else "autograd" for name in HEADS}
    head, finish, hidden, *_ = case("frozen", torch.bfloat16)
    assert way(head, hidden) == "autograd"
    with torch.autocast("cpu", torch.bfloat16):
        assert way(plain_head(False, torch.float32), torch.ones(1, WIDTH)) == "autograd"
    hooked = plain_head(False, torch.float32)
    hooked.register_forward_hook(lambda *_: None)
    assert way(hooked, torch.ones(1, WIDTH)) == "autograd"


@pytest.mark.parametrize("name", ["frozen", "4-bit"])
def test_without_gradients_every_token_is_known(name: str) -> None:
    head, finish, hidden, targets, groups = case(name, torch.float32)
    with torch.no_grad():
        found = chunked_cross_entropy(head, hidden, targets, groups, finish)
    theirs, _ = plain(head, finish, hidden, targets, torch.float32)
    assert found.nll is not None
    torch.testing.assert_close(found.nll.double(), theirs, rtol=1e-5, atol=1e-5)
    assert not found.total.requires_grad


def test_few_tokens_of_a_group_and_none_at_all() -> None:
    head, finish, hidden, targets, groups = case("frozen", torch.float32)
    leaf = hidden.requires_grad_()
    assert chunked_cross_entropy(head, leaf[:9], targets[:9], groups[:9], finish).nll is not None
    found = chunked_cross_entropy(head, leaf[:0], targets[:0], groups[:0], finish)
    found.total.backward()
    assert found.total.item() == 0.0
    assert float(leaf.grad.abs().max()) == 0.0


@pytest.mark.parametrize("name", ["frozen", "trained", "softcap"])
def test_its_operations_can_be_counted(name: str) -> None:
    """PyTorch's counter hooks what a module is given, and refuses a leaf where ``autograd.grad`` is called."""
    head, finish, hidden, targets, groups = case(name, torch.float32)
    hidden.requires_grad_()
    with FlopCounterMode(display=False) as counted:
        chunked_cross_entropy(head, hidden, targets, groups, finish).total.backward()
    product = 2 * TOKENS * WIDTH * VOCABULARY
    gradients_of = 1 + any(each.requires_grad for each in head.parameters())
    assert counted.get_total_flops() >= (1 + gradients_of) * product


def test_memory_does_not_grow_with_the_tokens() -> None:
    """The largest tensor that is ever made has a chunk's logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(each, Tensor):
                    self.numbers = max(self.numbers, each.numel())
            return result

    for dtype in (torch.float32, torch.bfloat16):
        head, finish, *_ = case("frozen", dtype)
        hidden = torch.randn(4096, WIDTH).to(dtype).requires_grad_()
        targets = torch.randint(0, VOCABULARY, (4096,))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "IN_PLACE", 2**13)
            patch.setattr(room, "_KEPT", 2**13)
            with Largest() as seen:
                chunked_cross_entropy(head, hidden, targets, None, finish).total.backward()
        assert seen.numbers == 4096 * WIDTH  # the hidden states; all logits are five times as many


def test_ligers_loss_where_it_is_installed_and_pytorchs_where_it_is_too_old(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No kernel runs here: Liger's function is stood in for, and a device is made believe."""
    functions = pytest.importorskip("liger_kernel.transformers.functional")
    asked: list[Any] = []

    def fused(hidden: Tensor, weight: Tensor, target: Tensor, **settings: Any) -> Tensor:
        asked.append(settings)
        cap = settings["softcap"]
        logits = Finish(softcap=cap)(functional.linear(hidden, weight, settings["bias"]))
        return functional.cross_entropy(logits, target, reduction=settings["reduction"])

    monkeypatch.setattr(functions, "liger_fused_linear_cross_entropy", fused)
    head, _, hidden, targets, groups = case("bias", torch.float32)
    on_gpu: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.float32)
    monkeypatch.setattr(room, "_is_plain", lambda head, hidden: True)
    assert way(head, on_gpu, Finish(softcap=5.0)) == "liger"
    monkeypatch.setattr(room, "way", lambda *_: "liger")
    leaf = hidden.requires_grad_()
    found = chunked_cross_entropy(head, leaf, targets, groups, Finish(scale=0.5, softcap=5.0))
    theirs, _ = plain(head, Finish(scale=0.5, softcap=5.0), hidden.detach(), targets, torch.float32)
    assert found.total.item() == pytest.approx(float(theirs.sum()), rel=1e-5)
    assert len(asked) == 4
    monkeypatch.undo()
    monkeypatch.setattr(room, "_is_plain", lambda head, hidden: True)
    monkeypatch.setattr(liger.metadata, "version", lambda name: "0.5.10")
    assert way(head, on_gpu) == BY_TORCH
    assert "liger-kernel 0.5.10 is too old: wanted 0.8 or newer" in caplog.text
