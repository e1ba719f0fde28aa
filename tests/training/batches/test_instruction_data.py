"""Tokenised instructions: what is masked, cut and padded, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.training.batches.instruction_data import InstructionCollator, InstructionDataset, padding_id

SHORT = Instruction.single("en", "Ada lives in", "Rome", "i.jsonl:1")
LONG = Instruction.single("sw", "Ben anakula", "mkate na samaki", "i.jsonl:2")


@pytest.fixture
def build(word_tokenizer: PreTrainedTokenizerFast) -> Callable[..., InstructionDataset]:
    def make(*instructions: Instruction, **settings: Any) -> InstructionDataset:
        settings = {"max_length": 20, **settings}
        return InstructionDataset(instructions, word_tokenizer, {"en": 0, "sw": 2}.__getitem__, **settings)

    return make


def test_prompt_is_masked_and_eos_is_learnt(
    build: Callable[..., InstructionDataset], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    example = build(SHORT)[0]
    words = word_tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["<s>", "Ada", "lives", "in", "Rome", "</s>"]
    assert example["labels"] == [-100] * 4 + example["input_ids"][4:]
    assert example["language_id"] == 0


def test_padding_on_the_right_and_everywhere_masked(
    build: Callable[..., InstructionDataset], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build(SHORT, LONG)
    batch = InstructionCollator(word_tokenizer)([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 7]
    assert batch["input_ids"][0].tolist() == [*data[0]["input_ids"], 0]
    assert batch["labels"][0].tolist() == [*data[0]["labels"], -100]
    assert batch["language_ids"].tolist() == [0, 2]


def test_a_tokenizer_without_padding_token_stays_without(word_tokenizer: PreTrainedTokenizerFast) -> None:
    bare = copy.deepcopy(word_tokenizer)
    bare.pad_token = None
    assert padding_id(bare) == bare.eos_token_id
    InstructionCollator(bare)
    assert bare.pad_token is None


def test_too_long(build: Callable[..., InstructionDataset], caplog: pytest.LogCaptureFixture) -> None:
    assert len(build(SHORT, LONG, max_length=7)) == 2
    assert caplog.text == ""
    cut = build(SHORT, LONG, max_length=6)
    assert cut[1]["input_ids"] == build(LONG)[0]["input_ids"][:6]
    assert cut[1]["labels"] == build(LONG)[0]["labels"][:6]
    assert "1 of 2 instructions have more than 6 tokens (max_length): cut at the end" in caplog.text
    assert len(build(SHORT, LONG, max_length=6, too_long="drop")) == 1
    with pytest.raises(DataError, match=r"i\.jsonl:2: has 7 tokens; wanted at most 6"):
        build(SHORT, LONG, max_length=6, too_long="error")
    with pytest.raises(DataError, match=r"i\.jsonl:1: nothing to learn within max_length = 4 .* alone has 4"):
        build(SHORT, max_length=4)
    with pytest.raises(DataError, match="none is left"):
        build(LONG, max_length=6, too_long="drop")


def test_the_context_is_named_where_it_is_the_limit(
    build: Callable[..., InstructionDataset], caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody is told to raise max_length, which would change nothing."""
    build(SHORT, LONG, max_length=6, limit="the model's context")
    assert "1 of 2 instructions have more than 6 tokens (the model's context): cut at the end" in caplog.text
    with pytest.raises(DataError, match=r"wanted at most 6 \(the model's context\); too_long="):
        build(LONG, max_length=6, limit="the model's context", too_long="error")
    with pytest.raises(
        DataError, match=r"within the model's context = 2 tokens: .* alone has \d; shorten it"
    ):
        build(LONG, max_length=2, limit="the model's context")


def test_unknown_language_names_the_line(word_tokenizer: PreTrainedTokenizerFast) -> None:
    def language_id(language: str) -> int:
        raise ValueError(f"language: got {language!r}; this language space knows en")

    with pytest.raises(DataError, match=r"i\.jsonl:2: language: got 'sw'"):
        InstructionDataset([LONG], word_tokenizer, language_id, max_length=20)
