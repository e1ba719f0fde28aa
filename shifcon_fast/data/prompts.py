"""From conversations to token ids, the same for training and for generation.

Where the tokenizer has a chat template, it is used, unchanged. Where it has none, a conversation is its turns'
texts, one a line: ``prompt + "\\n"`` with the special tokens the tokenizer puts in front of a text (BOS), then the
response and the EOS token. Prompt and response are tokenised apart, so that the ids a model sees before it
generates are exactly the ids it was trained to continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction, Turn


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a conversation, and for each whether it is to be learnt (an assistant's words and their end)."""

    input_ids: list[int]
    learnt: list[bool]


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[Turn], *, use_chat_template: bool = True
) -> list[int]:
    """Token ids of a prompt, ready for ``generate``: what :func:`encode_example` puts before the response."""
    turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    if use_chat_template and _has_template(tokenizer):
        return _render(tokenizer, turns, add_generation_prompt=True)
    return _encode_start(tokenizer, "".join(turn.content + "\n" for turn in turns))


def prompt_text(
    tokenizer: Any, prompt: Sequence[Turn], *, delimiter: str = " ", use_chat_template: bool = False
) -> str:
    """A conversation as the text that a continuation is scored after.

    Without the chat template: worked examples, ``question + delimiter + answer`` each, separated by empty lines,
    then the last question.

    Raises:
        DataError: the chat template is asked for and the tokenizer has none.
    """
    if use_chat_template:
        if not _has_template(tokenizer):
            raise DataError("use_chat_template is True, and the tokenizer has no chat template")
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt]
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    ends = {"assistant": "\n\n", "user": delimiter, "system": "\n\n"}
    return "".join(turn.content + ends[turn.role] for turn in prompt[:-1]) + prompt[-1].content


def encode_continuation(tokenizer: Any, text: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and of what continues it, tokenised as one (as lm-evaluation-harness does).

    White space at the end of the text goes to the continuation, since tokens begin with a space and do not end in
    one. Where a token would span the border, the two are tokenised apart (the harness does not): no letter of the
    continuation may count as the text's. Special tokens are the tokenizer's own (BOS), and not added again where
    the text begins with BOS, as rendered chat templates do.
    """
    stripped = text.rstrip()
    if stripped:
        continuation, text = text[len(stripped) :] + continuation, stripped
    with_special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    whole, before = (
        _encode_start(tokenizer, part)
        if with_special
        else list(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (text + continuation, text)
    )
    if whole[: len(before)] != before or len(whole) == len(before):
        return before, list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    return before, whole[len(before) :]


def encode_example(
    tokenizer: Any, instruction: Instruction, *, use_chat_template: bool = True
) -> EncodedExample:
    """Token ids of a whole conversation, with the assistant's turns marked as learnt.

    Without a chat template only the last response is learnt, and the tokenizer's EOS token (if any) ends it.

    Raises:
        DataError: the chat template does not render a prompt as the beginning of the conversation, so that nobody
            can say where the response starts.
    """
    if use_chat_template and _has_template(tokenizer):
        return _encode_with_template(tokenizer, instruction)
    prompt = encode_prompt(tokenizer, instruction.turns[:-1], use_chat_template=False)
    response = list(tokenizer(instruction.turns[-1].content, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        response.append(tokenizer.eos_token_id)
    return EncodedExample(prompt + response, [False] * len(prompt) + [True] * len(response))


def _has_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def _encode_start(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None and len(ids) > len(bare) and ids[-1] == end and (not bare or bare[-1] != end):
        ids.pop()  # tokenizers that close every text with EOS would end the conversation before the response
    return ids


def _render(tokenizer: Any, turns: Sequence[Turn], *, add_generation_prompt: bool) -> list[int]:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    return list(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )["input_ids"]
    )


def _encode_with_template(tokenizer: Any, instruction: Instruction) -> EncodedExample:
    turns = instruction.turns
    ids = _render(tokenizer, turns, add_generation_prompt=False)
    learnt = [False] * len(ids)
    for index, turn in enumerate(turns):
        if turn.role != "assistant" or index == 0:
            continue
        is_last = index == len(turns) - 1
        upto = ids if is_last else _render(tokenizer, turns[: index + 1], add_generation_prompt=False)
        start = _start_of_response(tokenizer, turns[:index], ids)
        if start is None or ids[: len(upto)] != upto:
            if is_last:
                raise DataError(
                    f"{instruction.where}: the tokenizer's chat template does not render the prompt as the "
                    f"beginning of the conversation, so where the response starts is unknown; "
                    f"use_chat_template=False joins them plainly"
                )
            continue  # templates that rewrite earlier turns (drop their reasoning): learn the later ones only
        learnt[start : len(upto)] = [True] * (len(upto) - start)
    return EncodedExample(ids, learnt)


def _start_of_response(tokenizer: Any, prompt: Sequence[Turn], ids: list[int]) -> int | None:
    for add_generation_prompt in (True, False):
        start = _render(tokenizer, prompt, add_generation_prompt=add_generation_prompt)
        if ids[: len(start)] == start and len(start) < len(ids):
            return len(start)
    return None
