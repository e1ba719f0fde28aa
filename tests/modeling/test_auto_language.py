"""``language = "auto"``: rows find what their pooled states say, and are shifted as if it had been said."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.content import content_mask
from shifcon_fast.modeling.estimate_space import estimate_space

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["llama", "bloom"])
def attached(request, tiny_model, word_tokenizer, parallel_text):
    model = tiny_model(request.param, vocab=len(word_tokenizer)).eval()
    space = estimate_space(model, word_tokenizer, parallel_text, progress=False)
    return model, attach(model, space, forward=1, backward=3)


@pytest.fixture
def prompts(word_tokenizer, parallel_text):
    """Rows in several languages, padded on the left."""
    texts = [parallel_text[language][row] for row, language in enumerate(["sw", "en", "de", "tr", "sw"])]
    batch = word_tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def found_by_hand(model, handle, tokenizer, batch):
    mask = content_mask(batch["input_ids"], batch["attention_mask"], tokenizer.all_special_ids)
    (at_f,) = boundary_representations(model, **batch, pool_mask=mask, boundaries=[1])
    return handle.shift.router.probabilities(at_f).max(1)


@torch.no_grad()
def test_rows_are_shifted_by_what_they_find(attached, prompts, word_tokenizer):
    model, handle = attached
    likely = found_by_hand(model, handle, word_tokenizer, prompts)
    assert len(set(likely.indices.tolist())) > 1
    handle.threshold = sorted(likely.values.tolist())[1]  # the least sure row is below
    ids = torch.where(likely.values >= handle.threshold, likely.indices, -1)
    expected = model(**prompts, language_ids=ids).logits
    generated = model.generate(**prompts, language_ids=ids, **GREEDY)
    beams = model.generate(**prompts, language_ids=ids, num_beams=2, **GREEDY)
    assert not torch.equal(expected, model(**prompts, language_ids=torch.full_like(ids, -1)).logits)
    handle.reset_engagements()
    with warnings.catch_warnings(), handle.use("auto"):
        warnings.filterwarnings("error", message=".*language")
        torch.testing.assert_close(model(**prompts).logits, expected)
        assert torch.equal(model.generate(**prompts, **GREEDY), generated)
        assert torch.equal(model.generate(**prompts, num_beams=2, **GREEDY), beams)
        model(**prompts)
        assert [code for code, _ in handle.detected] == [handle.shift.languages[i] for i in likely.indices]
        torch.testing.assert_close(torch.tensor([p for _, p in handle.detected]), likely.values)
    assert handle.engagements[1]["shift"] > 0


@torch.no_grad()
def test_every_stream_keeps_its_own(attached, prompts, word_tokenizer):
    """Two caches go on by turns; a cache that was emptied begins anew."""
    model, handle = attached
    handle.threshold = 0.0
    handle.language = "auto"
    rows = [{name: value[row : row + 1] for name, value in prompts.items()} for row in (0, 2)]
    steps = torch.tensor([[7], [9]])
    expected = []
    for row in rows:
        ids = found_by_hand(model, handle, word_tokenizer, row).indices
        cache = DynamicCache()
        model(**row, past_key_values=cache, language_ids=ids)
        expected.append([model(step[None], past_key_values=cache, language_ids=ids).logits for step in steps])
    caches = [DynamicCache(), DynamicCache()]
    for row, cache in zip(rows, caches, strict=True):
        model(**row, past_key_values=cache)
    for step, token in enumerate(steps):
        for stream, cache in enumerate(caches):
            found = model(token[None], past_key_values=cache).logits
            torch.testing.assert_close(found, expected[stream][step])
    with pytest.raises(ValueError, match="the cache is of 2 rows, and this pass has 3"):
        two = DynamicCache()
        model(**{name: value[:2] for name, value in prompts.items()}, past_key_values=two)
        model(torch.ones(3, 1, dtype=torch.long), past_key_values=two)


@torch.no_grad()
def test_a_static_cache_that_is_used_again_looks_again(tiny_model, word_tokenizer, parallel_text):
    model = tiny_model("llama", vocab=len(word_tokenizer)).eval()
    space = estimate_space(model, word_tokenizer, parallel_text, progress=False)
    handle = attach(model, space, forward=1, backward=3)
    handle.threshold = 0.0
    static = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    seen = set()
    for language in ("sw", "de", "tr"):
        batch = word_tokenizer(
            [parallel_text[language][0], parallel_text[language][3]], return_tensors="pt", padding=True
        )
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ids = found_by_hand(model, handle, word_tokenizer, batch).indices
        seen.add(tuple(ids.tolist()))
        expected = model.generate(**batch, language_ids=ids, **static)
        with handle.use("auto"):
            assert torch.equal(model.generate(**batch, **static), expected)
    assert len(seen) > 1


@torch.no_grad()
def test_a_prompt_without_content_is_left_alone(attached, word_tokenizer):
    model, handle = attached
    token = torch.tensor([[word_tokenizer.bos_token_id or 1]])
    with handle.suspended():
        expected = model(token).logits
    with handle.use("auto"):
        torch.testing.assert_close(model(token).logits, expected)
    assert [p for _, p in handle.detected] == [0.0]


def test_auto_needs_a_router(tiny_model, random_space, attached):
    model, handle = attached
    with pytest.raises(ValueError, match="wanted 'auto' alone"):
        handle.language = ["auto", "sw"]
    with pytest.raises(ValueError, match=r"threshold: got 1\.5; wanted a probability"):
        handle.threshold = 1.5
    assert handle.detected == []
    handle.detach()
    shift = replace(handle.shift, router=None)
    with attach(model, shift) as bare, pytest.raises(ValueError, match='got "auto"; the shift has no router'):
        bare.language = "auto"
