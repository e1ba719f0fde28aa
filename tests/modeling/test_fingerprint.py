"""Fingerprints survive what keeps the residual stream, and tell other models apart."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.fingerprint import fingerprint_differences, model_fingerprint


@pytest.mark.every_architecture
def test_a_fingerprint_survives_json_and_tells_weights_apart(architecture, tiny_model):
    found = model_fingerprint(tiny_model(architecture))
    assert fingerprint_differences(json.loads(json.dumps(found)), found) == []
    other = model_fingerprint(tiny_model(architecture, seed=1))
    (difference,) = fingerprint_differences(found, other)
    assert "embedding" in difference
    assert found["config_sha256"] == other["config_sha256"]


def test_shapes_that_differ_are_named(tiny_model):
    small, deep = model_fingerprint(tiny_model("llama")), model_fingerprint(tiny_model("llama", layers=5))
    assert fingerprint_differences(small, deep) == [
        "num_hidden_layers 4 there, 5 here",
        "num_blocks 4 there, 5 here",
    ]
    assert small["config_sha256"] != deep["config_sha256"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_a_load_does_not_matter(dtype, tiny_model):
    model = tiny_model("llama")
    low = model_fingerprint(copy.deepcopy(model).to(dtype))
    full = model_fingerprint(model)
    assert low["embedding"] != full["embedding"]
    assert fingerprint_differences(full, low) == []
    assert fingerprint_differences(low, full) == []


def test_a_four_bit_load_of_the_checkpoint_matches(tiny_checkpoint):
    full = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, quantization_config=config, dtype=torch.bfloat16
    )
    ours, theirs = model_fingerprint(full), model_fingerprint(quantised)
    assert fingerprint_differences(ours, theirs) == []
    assert (ours["quantization"], theirs["quantization"]) == (None, "nf4")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"load_in_8bit": True}, "int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
    ],
)
def test_the_way_of_quantising_is_noted(config, name, tiny_model):
    model = tiny_model("llama")
    model.config.quantization_config = config
    assert model_fingerprint(model)["quantization"] == name


def test_a_model_in_a_wrapper_has_a_fingerprint(tiny_model):
    """Which has no config, as DistributedDataParallel has none."""
    model = tiny_model("llama")
    model.config.quantization_config = {"load_in_8bit": True}
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert model_fingerprint(wrapper) == model_fingerprint(model)
    assert model_fingerprint(wrapper)["quantization"] == "int8"


def test_a_space_of_other_weights_is_told(tiny_model, random_space, caplog):
    model = tiny_model("llama")
    space = random_space(model)
    alike, other, unknown = (model_fingerprint(model) for _ in range(3))
    other["quantization"] = "nf4"
    del unknown["quantization"]  # of a space that an earlier version made
    for fingerprint, told in ((alike, False), (unknown, False), (other, True)):
        caplog.clear()
        made = replace(space, card={"model": {"fingerprint": fingerprint}})
        attach(model, made, 1, 3).detach()
        assert ("it was estimated on this model nf4, which is not quantised here" in caplog.text) == told


@pytest.mark.parametrize("embedding", ["untouched", "adapted", "trained copy"])
def test_lora_training_does_not_matter(embedding, tiny_model, random_space):
    model = tiny_model("llama")
    before = model_fingerprint(model)
    config = {
        "untouched": {"target_modules": "all-linear"},
        "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
        "trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }[embedding]
    adapted = get_peft_model(model, LoraConfig(r=2, **config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    attach(adapted, random_space(adapted), forward=1, backward=2)
    assert fingerprint_differences(before, model_fingerprint(adapted)) == []


def test_weights_that_are_not_in_memory_are_not_compared(tiny_model):
    model = tiny_model("llama")
    before = model_fingerprint(model)
    absent = model_fingerprint(model.to("meta"))
    assert absent["embedding"] is None
    assert fingerprint_differences(before, absent) == []


def test_broken_weights_are_a_difference(tiny_model):
    model = tiny_model("llama")
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    assert fingerprint_differences(before, model_fingerprint(model)) != []
