"""Instructions and their token ids: what is learnt, and that special tokens stay the tokenizer's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction, Turn, read_instructions
from shifcon_fast.data.prompts import encode_example, encode_prompt

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] | upper }} {{ m['content'] }} {{ eos_token }} "
    "{% endfor %}{% if add_generation_prompt %}A {% endif %}"
)


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Wapi?"}, {"role": "assistant", "content": "Nairobi"}]
    path = write(
        tmp_path / "i.jsonl",
        {"lang": "sw", "prompt": "Wapi?", "response": "Nairobi"},
        {"lang": "sw", "messages": messages},
    )
    first, second = read_instructions(path)
    assert first.language == second.language == "sw"
    assert first.turns == second.turns == (Turn("user", "Wapi?"), Turn("assistant", "Nairobi"))
    assert second.where.endswith("i.jsonl:2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": "b"}, r"i\.jsonl:1: 'lang' is null"),
        ({"lang": "en", "prompt": "a"}, "wanted 'lang', 'prompt' and 'response'"),
        ({"lang": "en", "prompt": "a", "response": " "}, "'response' is empty"),
        ({"lang": "en", "messages": [{"role": "robot", "content": "x"}]}, r"'messages'\[0\].*wanted"),
        ({"lang": "en", "messages": [{"role": "user", "content": "x"}]}, "ends with role 'user'"),
        ({"lang": "en", "messages": "x"}, "wanted a list of messages"),
    ],
)
def test_bad_instructions(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_instructions(write(tmp_path / "i.jsonl", row))


def test_plain_join(word_tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_example(word_tokenizer, Instruction.single("en", "Ada lives in", "Rome"))
    assert word_tokenizer.convert_ids_to_tokens(example.input_ids) == [
        "<s>",
        "Ada",
        "lives",
        "in",
        "Rome",
        "</s>",
    ]
    assert example.learnt == [False, False, False, False, True, True]
    prompt = encode_prompt(word_tokenizer, "Ada lives in")
    assert example.input_ids[: len(prompt)] == prompt


def test_eos_that_a_tokenizer_appends_does_not_end_the_prompt(
    word_tokenizer: PreTrainedTokenizerFast,
) -> None:
    closing = copy.deepcopy(word_tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert closing("Ada lives").input_ids[-1] == 2
    assert encode_prompt(closing, "Ada lives") == encode_prompt(word_tokenizer, "Ada lives")
    instruction = Instruction.single("en", "Ada lives in", "Rome")
    assert encode_example(closing, instruction) == encode_example(word_tokenizer, instruction)


def test_chat_template_learns_every_assistant_turn(word_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = CHAT
    turns = (
        Turn("user", "Ada"),
        Turn("assistant", "lives"),
        Turn("user", "Ben"),
        Turn("assistant", "in Rome"),
    )
    example = encode_example(tokenizer, Instruction("en", turns))
    learnt = [id_ for id_, is_learnt in zip(example.input_ids, example.learnt, strict=True) if is_learnt]
    assert tokenizer.convert_ids_to_tokens(learnt) == ["lives", "</s>", "in", "Rome", "</s>"]
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    prompt = encode_prompt(tokenizer, turns[:3])
    assert example.input_ids[: len(prompt)] == prompt
    plain = encode_example(tokenizer, Instruction("en", turns), use_chat_template=False)
    assert plain == encode_example(word_tokenizer, Instruction("en", turns))


def test_template_that_hides_the_prompt_is_refused(word_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = "{% for m in messages | reverse %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(DataError, match=r"an instruction: .*chat template.*use_chat_template=False"):
        encode_example(tokenizer, Instruction.single("en", "Ada", "lives"))
