"""Ids beyond the embedding: padding is put where there is a row, and what would be fed is refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shifcon_fast.data.instructions import Instruction
from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.evaluation.exact_match import answer_questions
from shifcon_fast.evaluation.multiple_choice import measure_multiple_choice
from shifcon_fast.evaluation.sentences import sentence_batches
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.modeling.vocabulary import check_token_ids, embedding_rows, padding_id
from shifcon_fast.training.batches.contrastive_data import ContrastiveSampler
from shifcon_fast.training.batches.instruction_data import InstructionCollator, InstructionDataset

UNEQUAL = ["Ada lives in Rome", "Ben eats"]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def padded(word_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The usual trap: a padding token was added, and the model of 128 rows was not resized."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.add_tokens([f"<unused{index}>" for index in range(128 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 128
    return tokenizer


def test_padding_has_a_row(padded: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    assert embedding_rows(model) == 128
    assert (padding_id(padded), padding_id(padded, 128), padding_id(padded, 129)) == (128, 2, 128)
    bare = copy.deepcopy(padded)
    bare.eos_token = None
    assert padding_id(bare, 128) == 0


def test_estimation_and_evaluation_pad_within_the_embedding(
    padded: PreTrainedTokenizerFast, word_tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    text = {"en": [*UNEQUAL, "the cat"], "sw": ["Ben ana paka", "Ada", "paka wa Ben ni mzee"]}
    spaces = [
        estimate_space(model, each, text, batch_size=3, subspaces=False, progress=False)
        for each in (padded, word_tokenizer)
    ]
    torch.testing.assert_close(spaces[0].mean, spaces[1].mean)
    batch = next(sentence_batches(model, padded, UNEQUAL, batch_size=2, what="parallel"))
    assert int(batch.input_ids.max()) < 128
    asked = [Question(index, "en", sentence, 1) for index, sentence in enumerate(UNEQUAL)]
    found = answer_questions(model, padded, asked, max_new_tokens=2)
    expected = answer_questions(model, word_tokenizer, asked, max_new_tokens=2)
    words = [re.sub(r" ?<unused[0-9]+>", "", outcome.response) for outcome in found]
    assert words == [outcome.response for outcome in expected]
    chosen = [
        measure_multiple_choice(
            model, each, [Question(0, "en", "Ada lives in", "Rome", ("Rome", "the red cat"))]
        )
        for each in (padded, word_tokenizer)
    ]
    assert chosen[0][0].log_likelihoods == pytest.approx(chosen[1][0].log_likelihoods, rel=1e-5)
    result = evaluate(model, padded, text, progress=False)
    assert set(result.perplexity["unshifted"]) == {"en", "sw"}


def test_training_batches_pad_within_the_embedding(padded: PreTrainedTokenizerFast) -> None:
    data = InstructionDataset(
        [Instruction.single("en", each, "Rome") for each in UNEQUAL],
        padded,
        lambda language: 0,
        max_length=16,
        embedding_rows=128,
    )
    batch = InstructionCollator(padded, 128)([data[0], data[1]])
    assert int(batch["input_ids"].max()) < 128
    text = {"en": UNEQUAL, "sw": ["Ben ana paka", "Ada"]}
    sampler = ContrastiveSampler(text, "en", padded, list(text).index, batch_size=2, embedding_rows=128)
    assert int(sampler.batch(0)["input_ids"].max()) < 128


def test_a_token_without_a_row_is_named(padded: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    text = {"en": ["Ada [PAD] Rome", "Ben"], "sw": ["Ada", "Ben ana"]}
    message = r"'\[PAD\]' with id 128; the model's embedding has 128 rows.*resize_token_embeddings"
    with pytest.raises(ValueError, match=r"sentence 1 \(from 1\) of 'en': has the token " + message):
        estimate_space(model, padded, text, progress=False)
    with pytest.raises(
        ValueError, match=r"parallel: sentence 0 \(from 0\) of 'en': has the token " + message
    ):
        ContrastiveSampler(text, "en", padded, list(text).index, batch_size=2, embedding_rows=128)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: has the token " + message):
        told = Instruction.single("en", "Ada [PAD]", "Rome", "a.jsonl:3")
        InstructionDataset([told], padded, lambda language: 0, max_length=16, embedding_rows=128)
    with pytest.raises(ValueError, match=r"parallel\['en'\]\[0\]: has the token " + message):
        next(sentence_batches(model, padded, text["en"], batch_size=2, what="parallel['en']"))
    with pytest.raises(ValueError, match=r"question 4 \(en\): has the token " + message):
        answer_questions(model, padded, [Question(4, "en", "Ada [PAD]", 1)])
    with pytest.raises(ValueError, match=r"question 5 \(en\): has the token " + message):
        measure_multiple_choice(model, padded, [Question(5, "en", "Ada", "[PAD]", ("[PAD]", "Rome"))])
    check_token_ids([0, 127], padded, 128, "here")
