"""Merged checkpoints: stock transformers computes what the attached model does, from plain weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import shifcon_fast as sf
from shifcon_fast.export.merged import export_merged


def stock(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ["llama", "granite", "falcon", "gpt2"])
def test_stock_transformers_computes_the_shifted_logits(
    architecture: str,
    attached: Callable[..., Any],
    oracle: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    model = attached(architecture)
    found = export_merged(model, "sw", tmp_path)
    assert found.effect > 0.5
    oracle(model, "sw", tokens, merged=True).check(stock(tmp_path, tokens))


def test_every_mlp_layer_gets_a_bias_and_two_are_not_zero(
    attached: Callable[..., Any], tmp_path: Path
) -> None:
    export_merged(attached("llama"), "zh/Hans:x", tmp_path)
    biases = {
        key: value for key, value in load_file(tmp_path / "model.safetensors").items() if key.endswith("bias")
    }
    assert len(biases) == 4 * 3
    assert {key for key, value in biases.items() if value.any()} == {
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.2.mlp.down_proj.bias",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mlp_bias"] is True
    assert config["shifcon_fast"]["language"] == "zh/Hans:x"


@pytest.mark.parametrize("architecture", ["mistral"])
def test_an_architecture_without_such_a_bias_is_refused(
    architecture: str, attached: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=rf"{architecture} has no bias at .*down_proj, and .*mlp_bias.*--to peft takes it"
    ):
        export_merged(attached(architecture), "sw", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("architecture", ["gemma3_text"])
def test_without_the_shift_every_architecture_is_merged(
    architecture: str,
    attached: Callable[..., Any],
    oracle: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    model = attached(architecture)
    with pytest.raises(ValueError, match=r"cannot be a bias; --to gguf .* --to merged --without-shift"):
        export_merged(model, "sw", tmp_path)
    export_merged(model, None, tmp_path)
    oracle(model, None, tokens, merged=True).check(stock(tmp_path, tokens))


def test_a_plain_run_is_merged_without_a_language(
    adapted: Callable[..., Any], tiny_model: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    model = adapted(tiny_model("llama"))
    export_merged(model, None, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(stock(tmp_path, tokens), model(input_ids=tokens).logits)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"target_modules": ["embed_tokens", "down_proj"]}, {"name": "a"}]
)
def test_adapters_that_peft_alone_cannot_take(
    settings: dict[str, Any],
    attached: Callable[..., Any],
    oracle: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    model = attached("llama", **settings)
    export_merged(model, "sw", tmp_path)
    oracle(model, "sw", tokens, merged=True).check(stock(tmp_path, tokens))


def test_the_model_is_left_alone(attached: Callable[..., Any], tokens: Tensor, tmp_path: Path) -> None:
    model = attached("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_merged(model, "sw", tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.config.mlp_bias is False


def test_quantised_weights_are_written_out(
    attached: Callable[..., Any], tiny_checkpoint: Path, tokens: Tensor, tmp_path: Path
) -> None:
    base = sf.load_quantized(tiny_checkpoint, quantization="nf4", dtype=torch.float32)
    model = attached(base, name="swahili")
    found = export_merged(model, "sw", tmp_path)
    assert found.error < 1e-3 * found.effect
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].shape == (64, 128)
    ids = model.shifcon.language_ids(["sw"] * 3)
    with torch.no_grad():
        wanted = model(input_ids=tokens, language_ids=ids).logits
    torch.testing.assert_close(stock(tmp_path, tokens), wanted, rtol=1e-4, atol=1e-4)
    assert model.get_base_model().is_quantized


def test_weights_that_cannot_be_dequantised_are_refused_with_advice(
    attached: Callable[..., Any], tmp_path: Path
) -> None:
    model = attached("llama")

    class Stuck:
        """A quantizer of transformers without a way back."""

        def dequantize(self, model: Any, dtype: Any = None) -> Any:
            raise NotImplementedError("awq has no implementation of `dequantize`")

    model.get_base_model().hf_quantizer = Stuck()
    with pytest.raises(ValueError, match=r"cannot be written out in full \(awq.*--to peft leaves them"):
        export_merged(model, "sw", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_generation_settings_that_transformers_refuses_to_write(
    attached: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Llama 2's, for one: a temperature beside ``do_sample=False``."""
    model = attached("llama")
    model.generation_config.update(temperature=0.9, do_sample=False, eos_token_id=[2, 7])
    with caplog.at_level(logging.WARNING, logger="shifcon_fast"):
        export_merged(model, "sw", tmp_path)
    assert "generation settings are left out but for the tokens" in caplog.text
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert model.generation_config.temperature == 0.9


def test_an_older_checkpoint_is_replaced_whole(attached: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("kept")
    export_merged(attached("llama"), "sw", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    }
