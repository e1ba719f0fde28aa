"""The demo's word-level tokenizer."""

from __future__ import annotations

import pytest

from shifcon_fast.demo.tokenizer import SPECIAL_TOKENS, build_tokenizer, vocabulary
from shifcon_fast.demo.words import NAMES
from shifcon_fast.demo.world import WorldSettings, build_world


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_text_of_a_world_survives_the_round_trip(tokenizer) -> None:
    world = build_world(WorldSettings(seed=3))
    texts = sorted(
        {row["text"] for row in world.corpus} | {t for row in world.parallel for t in row.values()}
    )
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_word_is_a_token_and_punctuation_another(tokenizer) -> None:
    assert tokenizer.tokenize("Mia anafuga ng'ombe.") == ["Mia", "anafuga", "ng'ombe", "."]
    assert tokenizer.tokenize("Zebra?") == ["<unk>", "?"]


def test_special_tokens_come_first_and_every_name_is_known(tokenizer) -> None:
    words = vocabulary()
    assert tuple(words[:4]) == SPECIAL_TOKENS
    assert [
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ] == [
        0,
        1,
        2,
        3,
    ]
    assert set(NAMES) <= set(words)
    assert len(set(words)) == len(words) == len(tokenizer)


def test_it_is_the_same_after_saving(tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Welche Tiere hält Mia?"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text
    assert again.padding_side == "left"
