"""Attached models on the device, tiny Llama, Qwen3 and Gemma 3, against the shift by hooks and a CPU oracle."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shifcon_fast as sf
from shifcon_fast import ops
from shifcon_fast.modeling.architectures import locate_decoder

FORWARD, BACKWARD = 1, 3
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 1_000, "pad_token_id": 0}
every_architecture = pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])


@contextmanager
def shifted_by_hooks(model: nn.Module, space: sf.LanguageSpace, ids: Tensor) -> Iterator[nn.Module]:
    """The plain model with its blocks' inputs shifted: what an attached model has to equal."""
    blocks, pivot = locate_decoder(model).blocks, space.language_id(space.pivot)

    def hook(boundary: int, sign: float) -> Callable[..., tuple[Any, ...]]:
        vectors = space.mean[boundary, pivot] - space.mean[boundary]

        def shift(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *rest = arguments
            rows = ids.repeat_interleave(hidden.shape[0] // len(ids)).to(hidden.device)
            added = sign * vectors.to(hidden.device)[rows.clamp(min=0)][:, None]
            kept = ((rows < 0) | (rows == pivot))[:, None, None]
            return (torch.where(kept, hidden, (hidden + added).to(hidden.dtype)), *rest)

        return shift

    hooks = [
        blocks[boundary].register_forward_pre_hook(hook(boundary, sign))
        for boundary, sign in ((FORWARD, 1.0), (BACKWARD, -1.0))
    ]
    try:
        yield model
    finally:
        for each in hooks:
            each.remove()


def calls_of_operators() -> Counter[str]:
    """``ops.call_counts()`` whatever the backend."""
    counts: Counter[str] = Counter()
    for (operator, _), count in ops.call_counts().items():
        counts[operator] += count
    return counts


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_as_accurate_as_those_of_the_shift_by_hooks(
    architecture, dtype, tiny_model, random_space, batch, batch_ids, device
):
    """The oracle is the same model, with the same rounded weights, in float64 on the CPU."""
    model = tiny_model(architecture, dtype=dtype)
    space = random_space(model)
    on_cpu = {name: tensor.cpu() for name, tensor in batch.items()}
    real = batch["attention_mask"].bool().cpu()
    with torch.no_grad():
        exact_model = copy.deepcopy(model).double()
        with shifted_by_hooks(exact_model, space, batch_ids.cpu()):
            exact = exact_model(**on_cpu).logits[real]
        model.to(device)
        with shifted_by_hooks(model, space, batch_ids):
            theirs = model(**batch).logits.cpu()[real]
        unshifted = model(**batch).logits
        handle = sf.attach(model, space, FORWARD, BACKWARD)
        ours = model(**batch, language_ids=batch_ids).logits
    scale = exact.norm()
    error, allowed = ((logits.double() - exact).norm() / scale for logits in (ours.cpu()[real], theirs))
    assert error <= 2 * allowed + torch.finfo(dtype).eps
    assert (ours - unshifted).abs().amax(dim=(1, 2))[[0, 2]].min() > 0.1
    assert handle.bypassed == {}


@every_architecture
def test_rows_that_are_left_alone_equal_those_of_an_unshifted_pass(
    architecture, tiny_model, random_space, batch, batch_ids, device
):
    model = tiny_model(architecture, dtype=torch.bfloat16).to(device)
    sf.attach(model, random_space(model), FORWARD, BACKWARD)
    with torch.no_grad():
        unshifted = model(**batch).logits
        logits = model(**batch, language_ids=batch_ids).logits
    assert torch.equal(logits[[1, 3]], unshifted[[1, 3]])


@every_architecture
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_shift_by_hooks_on_the_cpu(
    architecture, checkpointing, tiny_model, random_space, batch, batch_ids, device, only_fast
):
    """And every block's norms ran on the fast backend, forward and backward: a silent fallback is right, too."""
    model = tiny_model(architecture)
    space = random_space(model)
    probe = torch.randn(4, 9, 128, generator=torch.Generator().manual_seed(3))
    probe *= batch["attention_mask"].cpu()[..., None]
    plain = copy.deepcopy(model)
    with shifted_by_hooks(plain, space, batch_ids.cpu()):
        on_cpu = {name: tensor.cpu() for name, tensor in batch.items()}
        (plain(**on_cpu).logits * probe).sum().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}

    model.to(device)
    handle = sf.attach(model, space, FORWARD, BACKWARD)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ops.reset_call_counts()
    (model(**batch, language_ids=batch_ids, use_cache=False).logits * probe.to(device)).sum().backward()
    sites = 4 * len(locate_decoder(model).architecture.norm_names)
    assert only_fast(ops.call_counts())
    counts = calls_of_operators()
    assert counts["add_shift_rms_norm"] >= sites * (2 if checkpointing else 1) - 1
    assert counts["add_shift_rms_norm_backward"] == sites
    assert handle.bypassed == {}
    for name, parameter in model.named_parameters():
        wanted = expected[name]
        error = (parameter.grad.cpu() - wanted).norm() / wanted.norm().clamp(min=1e-3)
        assert error < 1e-3, f"{name} is off by {error:.1e}"


@every_architecture
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_the_shift_by_hooks(
    architecture, beams, tiny_model, random_space, batch, batch_ids, device
):
    model = tiny_model(architecture).to(device)
    space = random_space(model)
    with shifted_by_hooks(model, space, batch_ids):
        expected = model.generate(**batch, num_beams=beams, use_cache=False, **GREEDY)
    unshifted = model.generate(**batch, num_beams=beams, **GREEDY)
    sf.attach(model, space, FORWARD, BACKWARD)
    tokens = model.generate(**batch, language_ids=batch_ids, num_beams=beams, **GREEDY)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, unshifted), "the shift must have changed what is generated"


@every_architecture
def test_compiled_models_equal_eager_ones(
    architecture, tiny_model, random_space, batch, batch_ids, device, only_fast
):
    model = tiny_model(architecture).to(device)
    sf.attach(model, random_space(model), FORWARD, BACKWARD)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def losses_and_gradients(call: Callable[..., Any]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = call(**batch, labels=labels, language_ids=batch_ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected, expected_gradients = losses_and_gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    ops.reset_call_counts()
    loss, gradients = losses_and_gradients(compiled)
    assert only_fast(ops.call_counts())
    counts = calls_of_operators()
    torch._dynamo.reset()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for ours, wanted in zip(gradients, expected_gradients, strict=True):
        assert (ours - wanted).norm() <= 2e-3 * wanted.norm().clamp(min=1e-3)
    for operator in ("add_shift_rms_norm", "add_shift_rms_norm_backward"):
        assert counts[operator] > 0, "the operator must be in the compiled graph"


def test_compiled_with_cuda_graphs_equals_eager(cuda, tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama").to(cuda)
    sf.attach(model, random_space(model), FORWARD, BACKWARD)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        for ids in (batch_ids, batch_ids.flip(0), batch_ids, batch_ids.flip(0)):
            expected = model(**batch, language_ids=ids, use_cache=False).logits
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(**batch, language_ids=ids, use_cache=False).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_an_attached_model_can_be_captured_in_a_cuda_graph(cuda, tiny_model, random_space, batch_ids):
    """The ids may change between replays: nothing of ours synchronises or reads them on the host."""
    model = tiny_model("llama").to(cuda)
    sf.attach(model, random_space(model), FORWARD, BACKWARD)
    tokens, ids = torch.randint(3, 128, (4, 9), device=cuda), batch_ids.clone()

    def call() -> Tensor:
        return model(input_ids=tokens, language_ids=ids, use_cache=False).logits

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for changed in (batch_ids.flip(0), batch_ids):
            ids.copy_(changed)
            tokens.copy_(torch.randint(3, 128, (4, 9), device=cuda))
            graph.replay()
            torch.testing.assert_close(captured, call(), rtol=1e-5, atol=1e-5)


def test_representations_equal_those_of_the_cpu(
    tiny_model, random_space, batch, batch_ids, device, only_fast
):
    """The pass of the contrastive loss, pooled at the area's boundaries, shifted."""
    model = tiny_model("llama")
    space = random_space(model)
    on_device = copy.deepcopy(model).to(device)
    found = []
    for each, where in ((model, torch.device("cpu")), (on_device, device)):
        handle = sf.attach(each, space, FORWARD, BACKWARD)
        pairs = {name: tensor.to(where) for name, tensor in batch.items()}
        pairs |= {"pool_mask": pairs["attention_mask"], "language_ids": batch_ids.to(where)}
        ops.reset_call_counts()
        loss = sf.mcl_loss(each, pairs, handle)
        loss.backward()
        grad = each.model.embed_tokens.weight.grad
        found.append((loss.detach().cpu(), grad.cpu()))
    assert only_fast(ops.call_counts())
    assert calls_of_operators().keys() >= {"masked_mean_pool", "info_nce", "add_shift_rms_norm"}
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert (found[1][1] - found[0][1]).norm() <= 1e-3 * found[0][1].norm()
