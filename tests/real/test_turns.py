"""On real tokenizers and a real model: a response is learnt behind the prompt of generation, and answers end."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shifcon_fast.data.chat_template import end_of_turn
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction, Turn
from shifcon_fast.data.prompts import encode_example, encode_prompt

LIMIT = 24
CAPITALS = {
    "en": [("What is the capital of Kenya?", "Nairobi"), ("What is the capital of France?", "Paris")],
    "de": [
        ("Was ist die Hauptstadt von Kenia?", "Nairobi"),
        ("Was ist die Hauptstadt von Frankreich?", "Paris"),
    ],
}
PARALLEL = {
    "en": ["The cat is old.", "She reads a book.", "It rains today.", "We live in a small town."],
    "de": [
        "Die Katze ist alt.",
        "Sie liest ein Buch.",
        "Heute regnet es.",
        "Wir wohnen in einer kleinen Stadt.",
    ],
}
# Gemma's own template, without its images and tools.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role'])"
    " + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The prompt opens the reasoning, as in DeepSeek-R1's distils, and with one line feed, as in Qwen's thinking models.
THINKING = (
    "{% for m in messages %}{% set content = m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def learnt(tokenizer: PreTrainedTokenizerBase, turns: tuple[Turn, ...]) -> str:
    """What is learnt behind the prompt that generation uses."""
    example = encode_example(tokenizer, Instruction("sw", turns))
    prompt = encode_prompt(tokenizer, turns[:-1])
    assert example.input_ids[: len(prompt)] == prompt
    assert all(example.learnt[len(prompt) :])
    return tokenizer.decode(example.input_ids[len(prompt) :])


@pytest.mark.parametrize("response", ["Nairobi", "\n\nNairobi", "Jibu:\n\n* Nairobi 🙂", "<b>Nairobi</b>"])
def test_chatml(smollm2: Path, response: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ["<|im_end|>"]
    turns = (Turn("user", "Mji mkuu wa Kenya?"), Turn("assistant", response))
    assert learnt(tokenizer, turns) == response + "<|im_end|>\n"
    tokenizer.chat_template = THINKING
    assert learnt(tokenizer, turns) == response + "<|im_end|>\n"
    reasoned = (turns[0], Turn("assistant", f"<think>\nKenya.\n</think>\n\n{response}"))
    assert learnt(tokenizer, reasoned) == f"Kenya.\n</think>\n\n{response}<|im_end|>\n"


def test_gemma(gemma3: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    turns = (Turn("user", "Mji mkuu wa Kenya?"), Turn("assistant", "Nairobi\n"))
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ["<eos>"]
    assert learnt(tokenizer, turns) == "Nairobi\n<eos>"
    tokenizer.chat_template = GEMMA
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ["<end_of_turn>"]
    assert learnt(tokenizer, turns) == "Nairobi<end_of_turn>\n"
    with pytest.raises(DataError, match=r"line 3: .*System role not supported.*first user message"):
        encode_example(tokenizer, Instruction("sw", (Turn("system", "Kwa ufupi."), *turns), "line 3"))
