"""Chat templates of many families: what is learnt is what is generated; what ends a turn is found by looking."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from shifcon_fast.data.chat_template import end_of_turn, stopping_ids
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction, Turn
from shifcon_fast.data.prompts import EncodedExample, encode_example, encode_prompt
from shifcon_fast.notices import warn_once

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# DeepSeek-R1's distils: the prompt opens the reasoning, a finished conversation has none.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# Qwen3: reasoning, or an empty one, in the last answer; none in earlier ones.
QWEN3 = (
    "{% for m in messages %}{% set content = m['content'] %}{% set reasoning = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + reasoning + '\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3-Thinking: the prompt opens the reasoning with one line feed, an empty one is rendered with two.
QWEN3_THINKING = QWEN3.replace(
    "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "

SPECIAL = (
    *("<pad>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|end|>", "<start_of_turn>", "<end_of_turn>"),
)


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which ``\\n\\n`` is a token, as in real ones; its EOS token ends documents, not turns."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(SPECIAL))
    tokenizer.train_from_iterator(["a\n\nb\n\nc\n\n", "Nairobi Nairobi"] * 9, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        additional_special_tokens=[*SPECIAL[4:]],
    )
    assert len(fast("\n\n").input_ids) == 1
    return fast


@pytest.fixture(autouse=True)
def says_it_again() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


def with_template(
    tokenizer: PreTrainedTokenizerFast, template: str, **tokens: str
) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    for name, token in tokens.items():
        setattr(changed, name, token)
    return changed


def parts(tokenizer: PreTrainedTokenizerFast, example: EncodedExample) -> tuple[str, str]:
    """What is learnt, and what stands before the last piece of it."""
    start = len(example.learnt) - example.learnt[::-1].index(False)
    assert all(example.learnt[start:])
    return tokenizer.decode(example.input_ids[:start]), tokenizer.decode(example.input_ids[start:])


def conversation(*contents: str, system: str | None = None) -> tuple[Turn, ...]:
    """A user's and an assistant's turns, in turns."""
    head = () if system is None else (Turn("system", system),)
    turns = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(contents)]
    return (*head, *turns)


@pytest.mark.parametrize(
    ("template", "response", "learnt"),
    [
        (CHATML, "Nairobi", "Nairobi<|im_end|>\n"),
        (CHATML, "\n\nNairobi", "\n\nNairobi<|im_end|>\n"),  # merges with the prompt's line feed
        (CHATML_MARKED, "Nairobi", "Nairobi<|im_end|>\n"),
        (R1, "Nairobi", "Nairobi<|endoftext|>"),
        (R1, "<think>\nKenya.\n</think>\n\nNairobi", "Kenya.\n</think>\n\nNairobi<|endoftext|>"),
        (R1, "Kenya.\n</think>\n\nNairobi", "Kenya.\n</think>\n\nNairobi<|endoftext|>"),
        (R1, "<b>Nairobi</b>", "<b>Nairobi</b><|endoftext|>"),
        (QWEN3, "Nairobi", "<think>\n\n</think>\n\nNairobi<|im_end|>\n"),
        (QWEN3, "<think>\nKenya.\n</think>\n\nNairobi", "<think>\nKenya.\n</think>\n\nNairobi<|im_end|>\n"),
        (QWEN3_THINKING, "Nairobi", "\n</think>\n\nNairobi<|im_end|>\n"),
        (GEMMA, " Nairobi \n", "Nairobi<end_of_turn>\n"),
        (PHI, "Nairobi", "Nairobi<|end|>\n<|endoftext|>"),
        (MISTRAL, "Nairobi", " Nairobi<|endoftext|>"),
    ],
)
def test_a_response_is_learnt_behind_the_prompt_of_generation(
    byte_tokenizer: PreTrainedTokenizerFast, template: str, response: str, learnt: str
) -> None:
    tokenizer = with_template(byte_tokenizer, template)
    turns = conversation("Ada", "Ben", "Mji mkuu wa Kenya?", response)
    for dialogue in (turns, turns[2:]):
        example = encode_example(tokenizer, Instruction("sw", dialogue))
        prompt = encode_prompt(tokenizer, dialogue[:-1])
        assert example.input_ids[: len(prompt)] == prompt
        if template is CHATML_MARKED:  # learns what is marked and the token that ends the turn
            learnt = "Nairobi<|im_end|>"
            assert example.learnt[-1] is False
            ended = len(example.learnt) - 1
            example = EncodedExample(example.input_ids[:ended], example.learnt[:ended])
        assert parts(tokenizer, example) == (tokenizer.decode(prompt), learnt)


@pytest.mark.parametrize(
    ("template", "earlier"),
    [(CHATML, True), (CHATML_MARKED, True), (GEMMA, True), (MISTRAL, True), (QWEN3, False), (R1, False)],
)
def test_an_earlier_turn_is_learnt_where_it_looks_as_generated(
    byte_tokenizer: PreTrainedTokenizerFast,
    template: str,
    earlier: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = with_template(byte_tokenizer, template)
    turns = conversation("Ada", "Ben", "Cem", "Nairobi")
    example = encode_example(tokenizer, Instruction("sw", turns))
    ids = [token for token, learn in zip(example.input_ids, example.learnt, strict=True) if learn]
    assert ("Ben" in tokenizer.decode(ids)) is earlier
    assert "Ada" not in tokenizer.decode(ids)
    assert "Cem" not in tokenizer.decode(ids)
    assert bool(caplog.records) is not earlier  # said


def test_what_a_template_leaves_out_is_said_once(
    byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(byte_tokenizer, R1)
    for _ in range(3):
        encode_example(tokenizer, Instruction.single("sw", "Ada", "Nairobi"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "opens a response with '<think>\\n'" in caplog.text


@pytest.mark.parametrize(
    ("turns", "said", "advice"),
    [
        (conversation("Ada", "Ben", system="Be brief."), "System role not supported", "first user message"),
        (
            (Turn("user", "Ada"), Turn("user", "Cem"), Turn("assistant", "Ben")),
            "roles must alternate",
            "join neighbouring messages",
        ),
    ],
)
def test_a_refusing_template_names_the_line_and_what_to_do(
    byte_tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], said: str, advice: str
) -> None:
    tokenizer = with_template(byte_tokenizer, GEMMA)
    instruction = Instruction("sw", tuple(turns), where="i.jsonl:7")
    message = rf"^i\.jsonl:7: .*{said}.*{advice}.*use_chat_template=False"
    with pytest.raises(DataError, match=message):
        encode_example(tokenizer, instruction)
    with pytest.raises(DataError, match=rf"^question 3: .*{said}"):
        encode_prompt(tokenizer, turns[:-1], where="question 3")
    assert encode_example(tokenizer, instruction, use_chat_template=False).learnt[-1]


def test_a_broken_template_is_no_traceback(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(byte_tokenizer, "{{ messages[0]['text'] + 'x' }}{{ nothing.there }}")
    with pytest.raises(
        DataError, match=r"an instruction: .*refuses the conversation, saying .*has no attribute 'text'"
    ):
        encode_example(tokenizer, Instruction.single("sw", "Ada", "Nairobi"))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML_MARKED, "<|im_end|>"),
        (R1, "<|endoftext|>"),
        (QWEN3, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (PHI, "<|end|>"),
        (MISTRAL, "<|endoftext|>"),
        (None, "<|endoftext|>"),
    ],
)
def test_what_ends_a_turn(byte_tokenizer: PreTrainedTokenizerFast, template: str | None, end: str) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = template
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == [end]
    plainly = end_of_turn(tokenizer, use_chat_template=False)
    assert tokenizer.convert_ids_to_tokens(plainly) == ["<|endoftext|>"]
    example = encode_example(tokenizer, Instruction.single("sw", "Ada", "Nairobi"))
    ids = [token for token, learn in zip(example.input_ids, example.learnt, strict=True) if learn]
    assert end_of_turn(tokenizer)[0] in ids  # it is learnt


def test_an_eos_token_that_was_changed_ends_turns(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    for template, expected in ((None, "</s>"), (MISTRAL, "</s>"), (R1, "</s>"), (CHATML, "<|im_end|>")):
        tokenizer = with_template(byte_tokenizer, template, eos_token="</s>")
        assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == [expected]


def test_templates_and_tokenizers_without_an_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    assert end_of_turn(with_template(byte_tokenizer, ENDLESS)) == []
    assert end_of_turn(with_template(byte_tokenizer, "{{ raise_exception('no') }}")) == []
    for_pictures = with_template(byte_tokenizer, CHATML.replace("m['content']", "m['content'][0]['text']"))
    assert end_of_turn(for_pictures) == []
    with pytest.raises(DataError, match="chat template"):
        encode_example(for_pictures, Instruction.single("sw", "Ada", "Nairobi"))
    without = copy.deepcopy(byte_tokenizer)
    without.eos_token = None
    assert end_of_turn(without) == []


@pytest.mark.parametrize(
    ("own", "ends", "expected"),
    [(None, [], []), (7, [], [7]), (7, [5], [5, 7]), ([7, 8], [8], [8, 7]), ([7, 5], [5, 5], [5, 7])],
)
def test_generation_stops_at_the_turns_end_and_at_the_models_own(
    own: int | list[int] | None, ends: list[int], expected: list[int]
) -> None:
    assert stopping_ids(GenerationConfig(eos_token_id=own), ends) == expected
