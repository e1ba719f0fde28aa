"""``generate`` with language ids: beams, sampling, the KV cache, left padding, mixed languages."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from shifcon_fast.modeling.attach import attach

# An end token that is never produced: every row gets all its new tokens.
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 1_000, "pad_token_id": 0}

STATIC = {"cache_implementation": "static", "disable_compile": True}

# Windows shorter than the prompt of ``batch``.
_WINDOW = {"sliding_window": 4}
_SOME = {"use_sliding_window": True, "max_window_layers": 2, **_WINDOW}
WINDOWS = {
    **dict.fromkeys(["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"], _SOME),
    **dict.fromkeys(
        ["mistral", "ministral", "ministral3", "mixtral", "gpt_oss", "phi3", "starcoder2"], _WINDOW
    ),
    **dict.fromkeys(["gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"], _WINDOW),
    **dict.fromkeys(["cohere2", "exaone4", "olmo3"], _WINDOW),
    "smollm3": {"use_sliding_window": True, **_WINDOW},
    "llama4_text": {"attention_chunk_size": 4},
}


def _widest(architecture):
    return {name: 64 for name in ("sliding_window", "attention_chunk_size") if name in WINDOWS[architecture]}


@pytest.mark.every_architecture(heavy=True, column="generation with beams, with and without a dynamic cache")
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_the_oracle_with_and_without_cache(
    architecture, beams, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(architecture)
    space = random_space(model)
    with shifted_by_hooks(model, space, batch_ids, {1: (1, 1.0), 3: (3, -1.0)}) as plain:
        expected = plain.generate(**batch, num_beams=beams, use_cache=False, **GREEDY)
    unshifted = model.generate(**batch, num_beams=beams, **GREEDY)
    attach(model, space, forward=1, backward=3)
    for use_cache in (True, False):
        tokens = model.generate(
            **batch, language_ids=batch_ids, num_beams=beams, use_cache=use_cache, **GREEDY
        )
        assert torch.equal(tokens, expected)
    assert not torch.equal(expected, unshifted), "the shift must have changed what is generated"
    assert torch.equal(model.generate(**batch, num_beams=beams, **GREEDY), unshifted)


def with_a_static_cache(model, handle, batch, batch_ids):
    """What the attached model generates; a skip where the plain one fails alike."""
    try:
        return model.generate(**batch, language_ids=batch_ids, **STATIC, **GREEDY)
    except (RuntimeError, ValueError, TypeError) as error:
        handle.detach()
        with pytest.raises((type(error), AttributeError)):
            model.generate(**batch, **STATIC, **GREEDY)
        pytest.skip(
            f"transformers {transformers.__version__} has no static cache for {model.config.model_type} itself"
        )


@pytest.mark.every_architecture(
    quick={"llama", "qwen3_5_text"}, slow="a static cache for one more model", column="a static cache"
)
def test_generation_with_a_static_cache_equals_the_oracle(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(architecture)
    space = random_space(model)
    with shifted_by_hooks(model, space, batch_ids, {1: (1, 1.0), 3: (3, -1.0)}) as plain:
        expected = plain.generate(**batch, use_cache=False, **GREEDY)
    handle = attach(model, space, forward=1, backward=3)
    assert torch.equal(with_a_static_cache(model, handle, batch, batch_ids), expected)


@pytest.mark.every_architecture(
    only=lambda row: row.model_type in WINDOWS,
    quick={"mistral", "gemma4_text", "llama4_text"},
    slow="a sliding window for one more model",
    column="sliding window",
)
def test_generation_past_a_sliding_window_equals_the_oracle(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(architecture, **WINDOWS[architecture])
    with torch.no_grad():
        whole = tiny_model(architecture, **{**WINDOWS[architecture], **_widest(architecture)})
        assert not torch.allclose(model(**batch).logits, whole(**batch).logits, rtol=1e-2), (
            "the window counts"
        )
    space = random_space(model)
    with shifted_by_hooks(model, space, batch_ids, {1: (1, 1.0), 3: (3, -1.0)}) as plain:
        expected = plain.generate(**batch, use_cache=False, **GREEDY)
    handle = attach(model, space, forward=1, backward=3)
    assert torch.equal(model.generate(**batch, language_ids=batch_ids, **GREEDY), expected)
    assert torch.equal(with_a_static_cache(model, handle, batch, batch_ids), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom"])
def test_a_left_padded_row_generates_what_it_generates_alone(
    architecture, tiny_model, random_space, batch, batch_ids
):
    model = tiny_model(architecture)
    attach(model, random_space(model), forward=1, backward=3)
    together = model.generate(**batch, language_ids=batch_ids, **GREEDY)[:, -6:]
    for row in range(4):
        real = batch["attention_mask"][row].bool()
        alone = model.generate(
            batch["input_ids"][row, real][None], language_ids=batch_ids[row : row + 1], **GREEDY
        )
        assert torch.equal(alone[0, -6:], together[row])


def test_sampled_sequences_of_a_row_share_its_language(tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama")
    attach(model, random_space(model), forward=1, backward=3)
    sampling = {"do_sample": True, "max_new_tokens": 5, "eos_token_id": 1_000, "pad_token_id": 0}
    torch.manual_seed(0)
    short = model.generate(**batch, language_ids=batch_ids, num_return_sequences=2, **sampling)
    torch.manual_seed(0)
    repeated = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in batch.items()}
    spelled_out = model.generate(**repeated, language_ids=batch_ids.repeat_interleave(2), **sampling)
    assert torch.equal(short, spelled_out)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_generation_through_a_peft_model(architecture, tiny_model, random_space, batch, batch_ids):
    model = tiny_model(architecture)
    space = random_space(model)
    with attach(model, space, forward=1, backward=3):
        expected = model.generate(**batch, language_ids=batch_ids, **GREEDY)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    attach(peft_model, space, forward=1, backward=3)  # a fresh LoRA is the identity
    assert torch.equal(peft_model.generate(**batch, language_ids=batch_ids, **GREEDY), expected)


@pytest.mark.every_architecture(heavy=True)
def test_forward_names_language_ids_and_keeps_its_other_parameters(architecture, tiny_model, random_space):
    model = tiny_model(architecture)
    before = inspect.signature(model.forward)
    handle = attach(model, random_space(model), forward=0, backward=1)
    during = inspect.signature(model.forward)
    assert [name for name in during.parameters if name != "language_ids"] == list(before.parameters)
    parameter = during.parameters["language_ids"]
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameter.default is None
    handle.detach()
    assert inspect.signature(model.forward) == before


def test_generate_refuses_language_ids_again_after_detach(tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama")
    attach(model, random_space(model), forward=0, backward=1).detach()
    with pytest.raises(ValueError, match="language_ids"):
        model.generate(**batch, language_ids=batch_ids, **GREEDY)
