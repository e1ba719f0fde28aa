"""A whole model of SmolLM2's shape, random weights: decoding with the shift on and off, and estimating a space."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shifcon_fast as sf
from shifcon_fast.demo.tokenizer import build_tokenizer
from shifcon_fast.demo.tokenizer import vocabulary as demo_vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parent / "step"))
SIZES = importlib.import_module("shapes").SIZES
make_space = importlib.import_module("variants").make_space
NEW_TOKENS, PROMPT = 16, 16
SENTENCES, WORDS, BATCH = 128, 30, 16


@pytest.fixture(scope="module")
def model(device: torch.device, smoke: bool) -> Any:
    size = SIZES["tiny" if smoke else "smollm2"]
    config = AutoConfig.for_model(size.model_type, **{**size.config, "eos_token_id": None})
    config.vocab_size = max(config.vocab_size, len(demo_vocabulary()))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def test_decoding(model: Any, take_turns: Any, device: torch.device, smoke: bool) -> None:
    """One row, greedy, so many tokens; off is the model as it came. Attaching is not timed."""
    space, area = make_space(model), SIZES["tiny" if smoke else "smollm2"].area
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT), device=device)
    ids = torch.ones(1, dtype=torch.long, device=device)
    # The same weights in two models: one is attached, the other never was.
    attached = type(model)(model.config).to(device, model.dtype).eval()
    attached.load_state_dict(model.state_dict(), assign=True)
    handle = sf.attach(attached, space, *area)
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }
    before = handle.engagements
    made = attached.generate(prompt, language_ids=ids, **options)
    assert made.shape[1] == PROMPT + NEW_TOKENS
    assert handle.engagements != before, "the shift did not engage"
    peers = {
        "ours": [lambda: attached.generate(prompt, language_ids=ids, **options)],
        "shift off": [lambda: model.generate(prompt, **options)],
    }
    take_turns(peers, case=f"decoding {NEW_TOKENS} tokens, SmolLM2's shape")


def test_estimation(model: Any, take_turns: Any, smoke: bool) -> None:
    """estimate_space against bare forward passes over the same batches, no further than it goes."""
    tokenizer = build_tokenizer()
    words = demo_vocabulary()[6:]
    generator = torch.Generator().manual_seed(0)

    def sentence() -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (WORDS,), generator=generator).tolist())

    parallel = {language: [sentence() for _ in range(4 if smoke else SENTENCES)] for language in ("en", "sw")}
    batches = [
        tokenizer(sentences[at : at + BATCH], return_tensors="pt", padding=True).to(model.device)
        for sentences in parallel.values()
        for at in range(0, len(sentences), BATCH)
    ]
    # The last block's output is no boundary, and is not computed.
    last = model.model.layers[:-1]

    def bare() -> None:
        whole = model.model.layers
        model.model.layers = last
        try:
            with torch.no_grad():
                for batch in batches:
                    model.model(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                    )
        finally:
            model.model.layers = whole

    def estimate() -> Any:
        return sf.estimate_space(model, tokenizer, parallel, batch_size=BATCH, progress=False)

    case = f"estimation, SmolLM2's shape, {2 * SENTENCES} sentences of {WORDS} words"
    take_turns({"ours": [estimate], "bare forward passes": [bare]}, case=case)
