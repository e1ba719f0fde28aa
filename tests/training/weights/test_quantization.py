"""NF4 loading: right values, gradients that survive evaluation, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from shifcon_fast.training.weights import quantization
from shifcon_fast.training.weights.quantization import load_quantized

bnb = pytest.importorskip("bitsandbytes")


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_train_evaluate_train_keeps_gradients(tiny_checkpoint: Path) -> None:
    torch.manual_seed(0)
    model = load_quantized(tiny_checkpoint, lora())
    ids = torch.randint(4, 100, (2, 9))
    before = gradients(model, ids)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    after = gradients(model, ids)
    assert len(before) == 4 * 7 * 2
    for name, gradient in before.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=0)


def test_weights_are_nf4_with_double_quantisation_and_close(tiny_checkpoint: Path) -> None:
    model = load_quantized(tiny_checkpoint)
    original = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = original.model.layers[0].mlp.up_proj.weight
    # For normal weights NF4 in blocks of 64 leaves an error of about 9 %.
    assert 0.03 < ((restored - weight).norm() / weight.norm()).item() < 0.12
    torch.testing.assert_close(model.lm_head.weight, original.lm_head.weight)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_only_adapters_train_and_they_are_float32(tiny_checkpoint: Path) -> None:
    model = load_quantized(tiny_checkpoint, lora(), dtype=torch.bfloat16)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.base_model.model.model.norm.weight.dtype == torch.bfloat16
    assert model.training


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_changes_no_gradient(tiny_checkpoint: Path, checkpointing: bool) -> None:
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    plain = load_quantized(tiny_checkpoint, lora(), gradient_checkpointing=False)
    torch.manual_seed(3)
    model = load_quantized(tiny_checkpoint, lora(), gradient_checkpointing=checkpointing)
    assert model.base_model.model.model.gradient_checkpointing == checkpointing
    expected = gradients(plain, ids)
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name])


def test_layers_the_cpu_kernel_gets_wrong_are_not_quantised(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = tiny_model("llama", hidden=32, layers=2)  # input sizes 32 and, for down_proj, 64
    original.save_pretrained(tmp_path)
    model = load_quantized(tmp_path)
    quantised = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert quantised == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert "12 linear layers" in caplog.text
    assert "multiple of 64, theirs is 32" in caplog.text
    ids = torch.randint(4, 100, (2, 9))
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight
    )
    assert torch.isfinite(model(ids).logits).all()


def test_no_quantisation(tiny_checkpoint: Path) -> None:
    model = load_quantized(tiny_checkpoint, quantization="none")
    original = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    ids = torch.randint(4, 100, (2, 9))
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0)


def test_bad_arguments(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='quantization: got \'int8\'; wanted "nf4" or "none"'):
        load_quantized(tiny_checkpoint, quantization="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no config\.json; wanted a folder with a model"):
        load_quantized(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds no model that can be loaded"):
        load_quantized(tmp_path, quantization="none")
    monkeypatch.setattr(quantization, "nf4_problem", lambda device: "bitsandbytes: no library")
    with pytest.raises(RuntimeError, match=r"NF4 does not work here: .*quantization='none'"):
        load_quantized(tiny_checkpoint)


@pytest.mark.parametrize(("bfloat16", "faster"), [(300.0, torch.bfloat16), (110.0, torch.float32)])
@pytest.mark.parametrize("native", [True, False])
def test_dtype_follows_checkpoint_device_and_processor(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bfloat16: float,
    faster: torch.dtype,
    native: bool,
) -> None:
    cpu = torch.device("cpu")
    speed = {
        "processor": "a Xeon",
        "versions": {},
        "quantization": "nf4",
        "float32": 100.0,
        "bfloat16": bfloat16,
    }
    monkeypatch.setattr(quantization, "has_native_bfloat16", lambda: native)
    monkeypatch.setattr(quantization, "known_speed", lambda quantization: speed)
    assert quantization.choose_dtype(cpu, torch.float32, "nf4") == torch.float32
    assert quantization.choose_dtype(cpu, None, "nf4") == torch.float32
    assert caplog.text == ""
    for _ in range(2):
        chosen = quantization.choose_dtype(cpu, torch.bfloat16, "nf4")
        assert chosen == (faster if native else torch.float32)
    said = f"a Xeon multiplies nf4 weights at {bfloat16:.0f} GFLOP/s in bfloat16 and 100 in float32 (measured"
    assert caplog.text.count(said) == native
    monkeypatch.setattr(quantization, "known_speed", lambda quantization: None)
    assert quantization.choose_dtype(cpu, torch.float16, "none") == torch.float32
    assert ("SHIFCON_CACHE" in caplog.text) == native


@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_what_the_user_says_overrules_the_processor(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: torch.dtype | None
) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).save_pretrained(tmp_path)
    speed = {"processor": "", "versions": {}, "quantization": "none", "float32": 1.0, "bfloat16": 9.0}
    measured: list[str] = []
    monkeypatch.setattr(quantization, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(quantization, "known_speed", lambda which: measured.append(which) or speed)
    model = load_quantized(tmp_path, quantization="none", dtype=asked)
    assert model.dtype == (asked or torch.bfloat16)
    assert measured == ([] if asked else ["none"])


def test_names_of_dtypes() -> None:
    assert [quantization.read_dtype(each) for each in (None, "auto", "bfloat16")] == [
        None,
        None,
        torch.bfloat16,
    ]
    with pytest.raises(ValueError, match="dtype: got 'bf16'; wanted auto, float32, bfloat16, float16"):
        quantization.read_dtype("bf16")


def test_nf4_works_here_and_a_broken_library_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantization.nf4_problem(torch.device("cpu")) is None
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64))
    assert "off by 1.00" in str(quantization.nf4_problem(torch.device("cpu")))
