"""Perplexity against float64 log-softmax over one unpadded sentence at a time."""

import math

import numpy as np
import pytest
import torch

from shifcon_fast.evaluation.perplexity import Perplexity, measure_perplexity


def naive_nll(model, tokenizer, sentence: str, **extra: object) -> tuple[float, int]:
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, **extra).logits[0].double().numpy()
    total = 0.0
    for position, target in enumerate(ids[0, 1:].tolist()):
        row = logits[position]
        total += math.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
    return total, ids.shape[1] - 1


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_tokens_weigh_the_same_in_every_batch(tiny_model, word_tokenizer, parallel_text, batch_size) -> None:
    model, texts = tiny_model(), parallel_text["en"]
    found = measure_perplexity(model, word_tokenizer, texts, language="en", batch_size=batch_size)
    wanted = [naive_nll(model, word_tokenizer, text) for text in texts]
    assert found.tokens == [tokens for _, tokens in wanted]
    assert len(set(found.tokens)) > 1
    assert found.nll == pytest.approx([nll for nll, _ in wanted], rel=1e-5)
    exact = math.exp(sum(nll for nll, _ in wanted) / sum(tokens for _, tokens in wanted))
    assert found.value == pytest.approx(exact, rel=1e-5)


def test_an_attached_model_is_scored_shifted(attached, word_tokenizer, parallel_text) -> None:
    texts = parallel_text["sw"]
    shifted = measure_perplexity(attached.model, word_tokenizer, texts, language="sw", handle=attached)
    wanted = [
        naive_nll(attached.model, word_tokenizer, text, language_ids=attached.language_ids("sw"))
        for text in texts
    ]
    assert shifted.nll == pytest.approx([nll for nll, _ in wanted], rel=1e-5)
    plain = measure_perplexity(attached.model, word_tokenizer, texts, language="sw")
    assert abs(math.log(shifted.value / plain.value)) > 1e-3
    english = parallel_text["en"]
    pivot = measure_perplexity(attached.model, word_tokenizer, english, language="en", handle=attached)
    assert pivot == measure_perplexity(attached.model, word_tokenizer, english, language="en")


def test_the_average_is_over_tokens_not_sentences() -> None:
    assert Perplexity([1.0, 9.0], [1, 3]).value == pytest.approx(math.exp(10 / 4))
    assert Perplexity([1e6], [1]).value == math.inf


def test_nothing_to_predict_is_an_error(tiny_model, word_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"parallel\['en'\]\[0\] has 130 tokens"):
        measure_perplexity(tiny_model(), word_tokenizer, ["Rome " * 129], language="en")
