"""``torch.compile`` of an attached model in training: graph breaks, recompilation, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from shifcon_fast.modeling.attach import attach
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.compiling import compilable
from shifcon_fast.training.weights.checkpointing import enable_gradient_checkpointing

Batch = dict[str, Any]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(rows: int, tokens: int, languages: list[int]) -> Batch:
    ids = torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "language_ids": torch.tensor(languages),
    }


def gradients(call: Any, model: Any, inputs: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    call(**inputs, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def make_model(
    load_model: Callable[..., Any], tiny_model: Callable[..., Any], space: LanguageSpace
) -> Callable[..., Any]:
    """A checkpointed PEFT model; unquantised, it has adapters on few layers, which is less to trace."""

    def make(quantization: str) -> Any:
        if quantization == "nf4":
            return load_model(quantization="nf4")
        model = tiny_model("llama", layers=space.mean.shape[0], hidden=space.mean.shape[-1])
        enable_gradient_checkpointing(model)
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(model, lora).train()

    return make


@pytest.mark.parametrize(
    "quantization",
    ["none", pytest.param("nf4", marks=pytest.mark.slow("torch.compile of one more model"))],
)
def test_no_graph_breaks_and_no_recompilation_by_language_or_rows(
    quantization: str, make_model: Callable[..., Any], space: LanguageSpace
) -> None:
    """A graph for the first shape and one for all others, whatever the languages; checkpointed, with gradients."""
    model = make_model(quantization)
    attach(model, space, forward=1, backward=3)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    graphs = 0

    def count(graph: Any, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, backend=count)
    found = []
    with compilable(model):
        for inputs in (
            batch(2, 6, [0, 1]),
            batch(2, 6, [2, -1]),  # another mix
            batch(3, 7, [1, 1, 0]),  # more rows and tokens, which PyTorch calls dynamic from here on
            batch(4, 9, [0, 0, 0, 0]),  # no row shifted
        ):
            found.append((gradients(compiled, model, inputs), gradients(model, model, inputs), graphs))
    assert dict(counters["graph_break"]) == {}
    assert [seen for _, _, seen in found] == [1, 1, 2, 2]
    for ours, eager, _ in found:
        assert ours.keys() == eager.keys()
        assert len(ours) > 8
        for name, gradient in eager.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_hooks_of_reentrant_checkpointing_come_back(load_model: Callable[..., Any]) -> None:
    model = load_model()
    embedding, ids = model.get_input_embeddings(), torch.tensor([[5, 6]])
    before = dict(embedding._forward_hooks)
    assert before
    with compilable(model):
        assert not embedding(ids).requires_grad
    assert embedding(ids).requires_grad
    assert dict(embedding._forward_hooks) == before


def test_reentrant_checkpointing_keeps_its_hooks(load_model: Callable[..., Any]) -> None:
    model = load_model()
    for module in model.modules():
        if "_gradient_checkpointing_func" in module.__dict__:
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    with compilable(model):
        assert model.get_input_embeddings()(torch.tensor([[5, 6]])).requires_grad


@pytest.mark.slow("trains with a model that torch.compile traces, beside one that it does not")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_compiled_run_is_the_eager_run(quantization: str, make_trainer: Callable[..., Any]) -> None:
    """With vectors that follow training, a contrastive pass, and batches of several languages and lengths."""
    losses = []
    for compiled in (True, False):
        trainer = make_trainer(
            folder=f"run-{compiled}",
            quantization=quantization,
            torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
            vectors="ema",
            final_estimation=False,
            max_steps=4,
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert trainer.model.get_input_embeddings()._forward_hooks  # there again
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow("compiles C++ that inductor has written")
def test_inductor_gives_the_same_gradients(load_model: Callable[..., Any], space: LanguageSpace) -> None:
    model = load_model()
    attach(model, space, forward=1, backward=3)
    inputs = batch(3, 7, [1, -1, 0])
    with compilable(model):
        ours, eager = (gradients(call, model, inputs) for call in (torch.compile(model), model))
    assert ours.keys() == eager.keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)
