"""A loss in several passes is the loss of one, with its gradients, and holds one pass's activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from shifcon_fast.modeling.attach import attach
from shifcon_fast.objective import gradient_cache, mcl
from shifcon_fast.objective.gradient_cache import encode_in_turns, passes_needed
from shifcon_fast.objective.mcl import ContrastiveBatch, mcl_loss
from shifcon_fast.space.language_space import LanguageSpace

LAYERS, FORWARD, BACKWARD, PAIRS = 4, 1, 3, 5


@pytest.fixture
def build(
    tiny_model: Callable[..., PreTrainedModel], random_space: Callable[..., LanguageSpace]
) -> Callable[..., Any]:
    def build(dropout: float = 0.0) -> Any:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
        model = get_peft_model(tiny_model(layers=LAYERS), lora)
        attach(model, random_space(LAYERS, 32), FORWARD, BACKWARD)
        return model.train()

    return build


@pytest.fixture
def batch() -> ContrastiveBatch:
    """Five pairs of 4 to 9 tokens; BOS (1) is attended to but not content."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 100, (2 * PAIRS, 9), generator=generator)
    ids[:, 0] = 1
    lengths = torch.randint(4, 10, (2 * PAIRS, 1), generator=generator)
    attention = (torch.arange(9) < lengths).long()
    return ContrastiveBatch(
        input_ids=ids.masked_fill(attention == 0, 0),
        attention_mask=attention,
        pool_mask=(attention == 1) & (ids != 1),
        language_ids=torch.tensor([0] * PAIRS + [1, 2, 3, 1, 2]),
    )


def loss_and_gradients(model: Any, *args: Any, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    loss = mcl_loss(model, *args, **settings)
    (3.0 * loss).backward()  # as a weight and a gradient scaler would
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("mode", ["shifted", "pooled"])
@pytest.mark.parametrize(
    ("size", "checkpointing"), [(1, False), (2, False), (3, True), (2, "reentrant"), (8, False)]
)
def test_loss_and_every_gradient_are_those_of_one_pass(
    *, build: Callable[..., Any], batch: ContrastiveBatch, mode: str, size: int, checkpointing: bool | str
) -> None:
    model = build()
    expected = loss_and_gradients(model, batch, model.shifcon, mode=mode)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    found = loss_and_gradients(model, batch, model.shifcon, mode=mode, mini_batch_size=size)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_drops_the_same_in_the_second_pass(
    build: Callable[..., Any], batch: ContrastiveBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same mini-batches with all their graphs kept."""
    model = build(dropout=0.5)
    found = loss_and_gradients(model, batch, model.shifcon, mini_batch_size=2)
    afterwards = torch.rand(1)
    monkeypatch.setattr(mcl, "encode_in_turns", lambda encode, parts: [encode(part) for part in parts])
    expected = loss_and_gradients(model, batch, model.shifcon, mini_batch_size=2)
    assert torch.equal(afterwards, torch.rand(1)), "the second passes moved the generator on"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    other = mcl_loss(model, batch, model.shifcon, mini_batch_size=2).detach()
    assert not torch.equal(other, expected["loss"]), "dropout is off"


def test_activations_of_one_part_at_a_time() -> None:
    held: set[int] = set()
    most = []

    class Keeps(torch.autograd.Function):
        """Counts the parts whose activations are held."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, part: int) -> Tensor:
            activation = x.exp()
            ctx.save_for_backward(activation)
            held.add(part)
            ctx.part = part
            return activation

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            (activation,) = ctx.saved_tensors  # recomputed here
            most.append(len(held))
            held.discard(ctx.part)
            return gradient * activation, None

    weight = nn.Parameter(torch.ones(3))
    calls = []

    def encode(part: int) -> Tensor:
        calls.append(part)
        return Keeps.apply(weight * part, part).sum()

    found = encode_in_turns(encode, [1, 2, 3, 4])
    assert calls == [1, 2, 3, 4]
    held.clear()
    held.add(4)  # the last one's graph is whole
    torch.stack(found).sum().backward()
    assert calls == [1, 2, 3, 4, 3, 2, 1], "from the last one, which is not run again"
    assert most == [1, 1, 1, 1]
    expected = sum(part * torch.exp(torch.tensor(float(part))) for part in (1, 2, 3, 4))
    torch.testing.assert_close(weight.grad, expected.expand(3))


def test_memory_of_saved_activations(build: Callable[..., Any], batch: ContrastiveBatch) -> None:
    """What the graph of a cached loss holds is what that of its last mini-batch holds."""
    model = build()

    def held(size: int | None) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = mcl_loss(model, batch, model.shifcon, mini_batch_size=size)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert loss.requires_grad
        return sum(size for pointer, size in kept.items() if pointer not in weights)

    assert held(1) < held(None) / 3


def test_unequal_processes_run_equally_many_passes() -> None:
    assert passes_needed([7], None) == 1
    assert passes_needed([7], 3) == 3
    assert passes_needed([7, 4], 2) == 4
    with pytest.raises(ValueError, match=r"\[7, 3\] pairs, and the most need 4 passes"):
        passes_needed([7, 3], 2)
    with pytest.raises(ValueError, match="mini_batch_size: got 0"):
        gradient_cache.passes_needed([7], 0)
