"""PEFT alone: stock ``PeftModel`` computes what the attached model does, or the error says what works instead."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import shifcon_fast as sf
from shifcon_fast.export.peft_alone import export_peft


def stock(base: Any, folder: Path, tokens: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lora_bias=True.*")  # that it cannot be merged
        model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits  # type: ignore[no-any-return]


QUICK = ("llama", "granite", "gpt2")  # plain; a scaled branch; no nn.Linear, a bias of its own
SLOW = (
    *(
        "mistral",
        "ministral",
        "ministral3",
        "qwen2",
        "qwen3",
        "qwen3_5_text",
        "phi3",
        "gemma",
        "apertus",
        "smollm3",
    ),
    *(
        "hunyuan_v1_dense",
        "lfm2",
        "cohere",
        "cohere2",
        "stablelm",
        "falcon",
    ),
    *("gpt_neox", "bloom", "opt", "starcoder2"),
)


@pytest.mark.parametrize(
    "architecture",
    [
        *QUICK,
        *(
            pytest.param(name, marks=pytest.mark.slow("every architecture that takes an export"))
            for name in SLOW
        ),
    ],
)
def test_stock_peft_computes_the_shifted_logits(
    *,
    architecture: str,
    attached: Callable[..., Any],
    tiny_model: Callable[..., Any],
    oracle: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    model = attached(architecture)
    found = export_peft(model, "sw", tmp_path)
    assert found.effect > 0.1
    oracle(model, "sw", tokens).check(stock(tiny_model(architecture), tmp_path, tokens))


@pytest.mark.slow("every architecture that takes an export")
@pytest.mark.parametrize("architecture", ["llama4_text", "granitemoehybrid", "xglm"])
def test_what_transformers_does_not_run_in_float64(
    architecture: str,
    attached: Callable[..., Any],
    tiny_model: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    """PEFT's "all-linear" breaks the router of Llama 4."""
    model = attached(architecture, target_modules=["q_proj", "v_proj"])
    export_peft(model, "sw", tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=tokens, language_ids=model.shifcon.language_ids(["sw"] * 3)).logits
    torch.testing.assert_close(stock(tiny_model(architecture), tmp_path, tokens), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma3_text", "olmo2"])
def test_a_norm_behind_the_mlp_is_refused_and_the_way_out_named(
    architecture: str, attached: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=rf"--to peft: {architecture} has no layer .* --to gguf .* --to vllm"
    ):
        export_peft(attached(architecture), "sw", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": r".*\.[01]\.mlp\.down_proj"},
        {"exclude_modules": ["down_proj"]},
        {
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3},
            "use_rslora": True,
        },
        {"lora_bias": True},
        {"name": "swahili"},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids="-".join,
)
def test_whatever_the_adapter_targets_and_scales(
    *,
    settings: dict[str, Any],
    attached: Callable[..., Any],
    tiny_model: Callable[..., Any],
    oracle: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    model = attached("llama", **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    export_peft(model, "sw", tmp_path)
    oracle(model, "sw", tokens).check(stock(tiny_model("llama"), tmp_path, tokens))


def test_the_official_recipe_adds_one_block_earlier(
    attached: Callable[..., Any],
    tiny_model: Callable[..., Any],
    oracle: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    model = attached("llama", recipe="official")
    export_peft(model, "sw", tmp_path)
    oracle(model, "sw", tokens).check(stock(tiny_model("llama"), tmp_path, tokens))
    biases = {
        key
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
        if value.any() and key.endswith("bias")
    }
    assert {key.split("layers.")[1] for key in biases} == {
        "0.mlp.down_proj.lora_B.bias",
        "1.mlp.down_proj.lora_B.bias",
    }


def test_the_trained_weights_are_kept_and_the_model_is_left_alone(
    attached: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    model = attached("llama", target_modules=["q_proj"])
    ids = model.shifcon.language_ids(["sw"] * 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(input_ids=tokens, language_ids=ids).logits
    export_peft(model, "sw", tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert list(model.peft_config) == ["default"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, language_ids=ids).logits, logits)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(saved[key], trained[key]) for key in trained)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"].keys() == {
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    }


def test_languages_and_models_with_nothing_to_export(
    attached: Callable[..., Any], adapted: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = attached("llama")
    with pytest.raises(ValueError, match=r"'en' is the pivot.*nothing to export"):
        export_peft(model, "en", tmp_path)
    with pytest.raises(ValueError, match=r"language: got 'fr'.*en, sw"):
        export_peft(model, "fr", tmp_path)
    with pytest.raises(ValueError, match="trained without the shift"):
        export_peft(attached("llama", alpha=0.0), "sw", tmp_path)
    with pytest.raises(ValueError, match="no shift to export"):
        export_peft(adapted(tiny_model("llama")), "sw", tmp_path)
    with pytest.raises(TypeError, match="wanted an attached PeftModel"):
        export_peft(tiny_model("llama"), "sw", tmp_path)
    with pytest.raises(ValueError, match=r"shifts at boundary 0; wanted 1 or later.*train with forward >= 1"):
        export_peft(attached("llama", forward=0), "sw", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "Dora.*no bias.*--to gguf"),
        ({"init_lora_weights": "pissa"}, "starts from 'pissa'.*--to gguf"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "no lora_bias for the embedding.*--to gguf"),
    ],
)
def test_adapters_that_peft_gives_no_bias(
    settings: dict[str, Any], message: str, attached: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_peft(attached("llama", **settings), "sw", tmp_path)


def test_an_embedding_that_grew_is_carried_and_the_base_has_to_grow_first(
    attached: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    base.resize_token_embeddings(131, mean_resizing=False)
    model = attached(base, modules_to_save=["embed_tokens", "lm_head"])
    tokens = torch.tensor([[5, 129, 7, 130]])
    with caplog.at_level(logging.WARNING, logger="shifcon_fast"):
        export_peft(model, "sw", tmp_path)
    assert "base.resize_token_embeddings(131)" in caplog.text
    grown = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    grown.resize_token_embeddings(131, mean_resizing=False)
    with torch.no_grad():
        wanted = model(input_ids=tokens, language_ids=model.shifcon.language_ids("sw")).logits
    torch.testing.assert_close(stock(grown, tmp_path, tokens), wanted, rtol=0, atol=1e-5)


def test_an_adapter_that_does_not_engage_is_not_kept(
    attached: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a server ignores what it is given: here PEFT is made to forget the biases."""
    model = attached("llama")
    original = peft.PeftModel.load_adapter

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for name, parameter in self.named_parameters():
            if name.endswith("lora_B.exported.bias"):
                parameter.data.zero_()
        return found

    monkeypatch.setattr(peft.PeftModel, "load_adapter", forgetful)
    with pytest.raises(ValueError, match="does not engage where it is loaded"):
        export_peft(model, "sw", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_layer_is_found_and_told_from_those_behind_a_norm(
    dtype: torch.dtype,
    attached: Callable[..., Any],
    tiny_model: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    model = attached(tiny_model("granite", dtype=dtype))
    found = export_peft(model, "sw", tmp_path / "adapter")
    assert found.error < 0.05 * found.effect
    with torch.no_grad():
        wanted = model(input_ids=tokens, language_ids=model.shifcon.language_ids(["sw"] * 3)).logits
    got = stock(tiny_model("granite", dtype=dtype), tmp_path / "adapter", tokens)
    assert (got - wanted).abs().max() < 0.05 * found.effect
    with pytest.raises(ValueError, match="gemma3_text has no layer"):
        export_peft(attached(tiny_model("gemma3_text", dtype=dtype)), "sw", tmp_path)


def test_a_4_bit_base_takes_the_adapter_as_it_is(
    attached: Callable[..., Any], tiny_checkpoint: Path, tokens: Tensor, tmp_path: Path
) -> None:
    model = attached(sf.load_quantized(tiny_checkpoint, quantization="nf4", dtype=torch.float32))
    assert type(model.get_base_model().model.layers[1].mlp.down_proj.base_layer).__name__ == "Linear4bit"
    found = export_peft(model, "sw", tmp_path)
    assert found.error < 1e-4 * found.effect
    got = stock(sf.load_quantized(tiny_checkpoint, quantization="nf4", dtype=torch.float32), tmp_path, tokens)
    with torch.no_grad():
        wanted = model(input_ids=tokens, language_ids=model.shifcon.language_ids(["sw"] * 3)).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
