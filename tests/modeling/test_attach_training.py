"""Gradients through an attached model: checkpointing, PEFT before and after, 4-bit weights."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.attach import attach


def _adapted(model, seed=0, **extra):
    """LoRA with random B matrices: a fresh adapter is the identity and would hide mistakes."""
    adapted = get_peft_model(
        model,
        # A router that returns a tuple (Llama 4) cannot be adapted.
        LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules="all-linear", exclude_modules=r".*\.router", **extra
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted


def _gradients(model, batch, ids):
    model.zero_grad()
    logits = model(**batch, language_ids=ids).logits
    probe = torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape)
    (logits * probe).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.every_architecture(heavy=True, column="gradient checkpointing, reentrant and not")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_shifted_blocks(
    architecture, reentrant, tiny_model, random_space, batch, batch_ids
):
    # Where layers share keys and values, transformers' own gradients are not those without reentrant checkpointing.
    alone = {"num_kv_shared_layers": 0} if reentrant and architecture == "gemma4_text" else {}
    model = tiny_model(architecture, **alone).train()
    attach(model, random_space(model), forward=1, backward=3)
    expected = _gradients(model, batch, batch_ids)
    unshifted = _gradients(model, batch, None)
    first = next(iter(expected))
    assert not torch.allclose(expected[first], unshifted[first], rtol=1e-2)

    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    block = locate_decoder(model).blocks[2]
    mixers = ("self_attn", "attention", "self_attention", "attn", "linear_attn", "mamba", "conv")
    attention = next(module for name, module in block.named_children() if name in mixers)
    attention.register_forward_pre_hook(lambda m, args, kwargs: runs.append(1), with_kwargs=True)
    _assert_same(_gradients(model, batch, batch_ids), expected)
    assert len(runs) == 2, "the block must really be recomputed"


@pytest.mark.every_architecture(heavy=True, column="PEFT, before and after attaching")
def test_peft_before_and_after_attach_are_the_same_model(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(architecture)
    space = random_space(model)
    before = _adapted(copy.deepcopy(model))
    with shifted_by_hooks(before, space, batch_ids, {1: (1, 1.0), 3: (3, -1.0)}) as plain, torch.no_grad():
        expected = plain(**batch).logits
    handle = attach(before, space, forward=1, backward=3)
    assert before.get_base_model().shifcon is handle

    bare = copy.deepcopy(model)
    attach(bare, space, forward=1, backward=3)
    after = _adapted(bare)
    for adapted in (before, after):
        with torch.no_grad():
            logits = adapted(**batch, language_ids=batch_ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-4)
    _assert_same(_gradients(after, batch, batch_ids), _gradients(before, batch, batch_ids))

    merged = after.merge_and_unload()
    with torch.no_grad():
        logits = merged(**batch, language_ids=batch_ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    merged.shifcon.detach()
    assert type(merged) is type(model)
    assert merged.state_dict().keys() == model.state_dict().keys()


@pytest.mark.usefixtures("reference_backend")  # bits are compared
def test_a_norm_that_peft_trains_engages_with_its_active_weight(tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama")
    space = random_space(model)
    adapted = _adapted(copy.deepcopy(model), modules_to_save=["input_layernorm"])
    trained = [
        name for name, p in adapted.named_parameters() if "modules_to_save" in name and p.requires_grad
    ]
    assert len(trained) == 4
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in trained:
                parameter.mul_(1.5)
    handle = attach(adapted, space, forward=1, backward=3)
    unpatched = copy.deepcopy(adapted)
    unpatched.get_base_model().shifcon.detach()
    with torch.no_grad():
        expected = unpatched(**batch).logits
        assert torch.equal(adapted(**batch).logits, expected)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**batch).logits, model(**batch).logits)
    assert handle.bypassed == {}
    gradients = _gradients(adapted, batch, batch_ids)
    assert all(gradients[name].abs().max() > 0 for name in trained)


@pytest.mark.parametrize("attach_first", [True, False])
def test_a_four_bit_model_trains_through_the_operators(
    attach_first, tiny_checkpoint, random_space, batch, batch_ids, shifted_by_hooks
):
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, quantization_config=config, dtype=torch.float32
    )
    space = random_space(model)
    if attach_first:
        handle = attach(model, space, forward=1, backward=3)
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    adapted = _adapted(model).train()
    if not attach_first:
        handle = attach(adapted, space, forward=1, backward=3)

    detached = copy.deepcopy(adapted)
    detached.get_base_model().shifcon.detach()
    with shifted_by_hooks(detached, space, batch_ids, {1: (1, 1.0), 3: (3, -1.0)}) as plain:
        logits = plain(**batch).logits
        probe = torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape)
        (logits * probe).sum().backward()
    found = _gradients(adapted, batch, batch_ids)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    assert len(found) == 2 * 7 * 4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert handle.bypassed == {}
    assert all(count > 0 for sites in handle.engagements.values() for count in sites.values())
