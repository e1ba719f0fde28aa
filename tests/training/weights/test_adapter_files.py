"""Adapters of any name and embeddings that were resized: trained, saved, resumed and loaded as the same model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast

import shifcon_fast as sf
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.modeling.vocabulary import embedding_rows
from shifcon_fast.training.trainer import ShifConTrainer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def logits(model: Any, language: str = "sw") -> torch.Tensor:
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, language_ids=model.shifcon.language_ids(language)).logits


def test_a_named_adapter_is_trained_resumed_and_loaded(
    tiny_checkpoint: Path,
    make_trainer: Callable[..., ShifConTrainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def build() -> Any:
        torch.manual_seed(3)
        model = get_peft_model(
            sf.load_quantized(tiny_checkpoint, quantization="none"), LORA, adapter_name="swahili"
        )
        model.add_adapter("other", LORA)
        return model

    trainer = make_trainer(
        model=build(), max_steps=2, save_strategy="steps", save_steps=1, final_estimation=False
    )
    assert "its adapter 'swahili'; 'other' are not part of it" in caplog.text
    trainer.train()
    loaded = sf.load(tmp_path / "run")
    assert loaded.active_adapters == ["swahili"]
    torch.testing.assert_close(logits(loaded), logits(trainer.model))
    torch.testing.assert_close(logits(sf.load(tmp_path / "run" / "checkpoint-2")), logits(trainer.model))
    plain = PeftModel.from_pretrained(
        sf.load_quantized(tiny_checkpoint, quantization="none"), tmp_path / "run"
    )
    assert plain.active_adapters == ["default"]

    again = make_trainer(model=build(), max_steps=2, final_estimation=False)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    torch.testing.assert_close(logits(again.model), logits(trainer.model))


def test_an_adapter_whose_name_is_a_path_is_refused(tiny_checkpoint: Path, make_trainer: Any) -> None:
    model = get_peft_model(
        sf.load_quantized(tiny_checkpoint, quantization="none"), LORA, adapter_name="up/down"
    )
    with pytest.raises(ValueError, match="its adapter is called 'up/down'; wanted a name that is no path"):
        make_trainer(model=model)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_resized_embedding_is_saved_and_loaded(
    *,
    tiny_checkpoint: Path,
    make_trainer: Callable[..., ShifConTrainer],
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    quantization: Any,
) -> None:
    caplog.set_level(logging.WARNING)
    model = sf.load_quantized(tiny_checkpoint, quantization=quantization)
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.add_tokens([f"<new{index}>" for index in range(140 - len(tokenizer))])
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LORA)
    text = {language: [f"<new139> {each}" for each in texts] for language, texts in parallel_text.items()}
    space = estimate_space(model, tokenizer, text, progress=False)
    trainer = make_trainer(model=model, space=space, parallel=text, max_steps=1, final_estimation=False)
    assert "The embedding was resized to 140 rows" in caplog.text
    trainer.train()
    loaded = sf.load(tmp_path / "run")
    assert embedding_rows(loaded) == 140
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(
        loaded.get_input_embeddings().weight, trainer.model.get_input_embeddings().weight, check_device=False
    )
    torch.testing.assert_close(logits(loaded), logits(trainer.model))


def test_a_resized_embedding_with_adapters_is_refused(tiny_checkpoint: Path, make_trainer: Any) -> None:
    model = sf.load_quantized(tiny_checkpoint, quantization="none")
    model.resize_token_embeddings(140)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"its embedding was resized and has adapters .*modules_to_save"):
        make_trainer(model=model)


def test_a_base_of_another_size_is_refused(
    make_trainer: Callable[..., ShifConTrainer],
    tiny_model: Any,
    word_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    make_trainer(max_steps=1, final_estimation=False).train()
    tiny_model("llama", hidden=64, layers=4, vocab=130).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"128 embedding rows; this one has 130.*--base"):
        sf.load(tmp_path / "run", base=tmp_path / "wide")
