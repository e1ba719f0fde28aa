"""From conversations to token ids, the same for training and for generation.

Where the tokenizer has a chat template, it is used, unchanged. Where it has none, a conversation is its turns'
texts, one a line: ``prompt + "\\n"`` with the special tokens the tokenizer puts in front of a text (BOS), then the
response and the EOS token. Prompt and response are tokenised apart, so that the ids a model sees before it
generates are exactly the ids it was trained to continue.

With a template too, a response is learnt behind exactly the ids of :func:`encode_prompt`. Most templates render the
prompt as the beginning of the conversation, and nothing needs to be done. Others open the response in the prompt
and leave that out of a finished conversation (DeepSeek-R1's ``<think>``), or their text tokenises otherwise where
prompt and response meet: then the response and what ends it follow the prompt's ids, tokenised apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shifcon_fast.data.chat_template import (
    PROBE,
    assistant_mask,
    end_of_turn,
    has_template,
    render_ids,
    render_text,
)
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction, Turn
from shifcon_fast.notices import warn_once


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a conversation, and for each whether it is to be learnt (an assistant's words and their end)."""

    input_ids: list[int]
    learnt: list[bool]


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[Turn], *, use_chat_template: bool = True, where: str = "the prompt"
) -> list[int]:
    """Token ids of a prompt, ready for ``generate``: what :func:`encode_example` puts before the response.

    Args:
        where: how to call the prompt in an error.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    if use_chat_template and has_template(tokenizer):
        return render_ids(tokenizer, turns, where, add_generation_prompt=True)
    return _encode_start(tokenizer, "".join(turn.content + "\n" for turn in turns))


def prompt_text(
    tokenizer: Any, prompt: Sequence[Turn], *, delimiter: str = " ", use_chat_template: bool = False
) -> str:
    """A conversation as the text that a continuation is scored after.

    Without the chat template: worked examples, ``question + delimiter + answer`` each, separated by empty lines,
    then the last question.

    Raises:
        DataError: the chat template is asked for and the tokenizer has none, or it refuses the conversation.
    """
    if use_chat_template:
        if not has_template(tokenizer):
            raise DataError("use_chat_template is True, and the tokenizer has no chat template")
        return render_text(tokenizer, prompt, "the prompt", add_generation_prompt=True)
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

    Without a chat template only the last response is learnt, and the tokenizer's EOS token (if any) ends it. With
    one, earlier turns are learnt where the template renders them as when they were generated. A template that marks
    the assistant's words itself (``{% generation %}``) decides what is learnt; the token that ends a turn is too.

    Raises:
        DataError: the chat template refuses the conversation, or rewrites the prompt once there is a response, so
            that nothing could be learnt behind the prompt that generation uses.
    """
    if use_chat_template and has_template(tokenizer):
        return _encode_with_template(tokenizer, instruction)
    prompt = encode_prompt(tokenizer, instruction.turns[:-1], use_chat_template=False)
    response = list(tokenizer(instruction.turns[-1].content, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        response.append(tokenizer.eos_token_id)
    return EncodedExample(prompt + response, [False] * len(prompt) + [True] * len(response))


def _encode_start(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None and len(ids) > len(bare) and ids[-1] == end and (not bare or bare[-1] != end):
        ids.pop()  # tokenizers that close every text with EOS would end the conversation before the response
    return ids


def _encode_with_template(tokenizer: Any, instruction: Instruction) -> EncodedExample:
    turns, where = instruction.turns, instruction.where
    prompt = render_ids(tokenizer, turns[:-1], where, add_generation_prompt=True)
    ids = render_ids(tokenizer, turns, where)
    if not _begins_with(ids, prompt):
        response = tokenizer(_response_text(tokenizer, turns, where), add_special_tokens=False)["input_ids"]
        return EncodedExample([*prompt, *response], [False] * len(prompt) + [True] * len(response))
    marked = assistant_mask(tokenizer, turns, where)
    if marked is not None and any(marked[len(prompt) :]):
        ends = end_of_turn(tokenizer)
        follows = [False, *marked[:-1]]
        learnt = [mark or (ids[i] in ends and follows[i]) for i, mark in enumerate(marked)]
        return EncodedExample(ids, learnt)
    learnt = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    for index, turn in enumerate(turns[:-1]):
        if turn.role == "assistant" and index > 0:
            _mark_earlier(tokenizer, turns[: index + 1], ids, learnt)
    return EncodedExample(ids, learnt)


def _mark_earlier(tokenizer: Any, turns: Sequence[Turn], ids: list[int], learnt: list[bool]) -> None:
    """Mark the last of some turns, where the whole conversation shows it as when it was generated."""
    try:
        prompt = render_ids(tokenizer, turns[:-1], "", add_generation_prompt=True)
        upto = render_ids(tokenizer, turns, "")
    except DataError:  # not as a conversation of its own
        prompt = upto = []
    if upto and _begins_with(ids, upto) and _begins_with(upto, prompt):
        learnt[len(prompt) : len(upto)] = [True] * (len(upto) - len(prompt))
    else:
        warn_once(
            "The chat template shows earlier assistant turns otherwise than as they are generated (without their "
            "reasoning, for instance): of conversations with several, only the turns that it shows as generated "
            "are learnt, and always the last."
        )


def _begins_with(ids: Sequence[int], prompt: Sequence[int]) -> bool:
    return len(ids) > len(prompt) and list(ids[: len(prompt)]) == list(prompt)


def _response_text(tokenizer: Any, turns: Sequence[Turn], where: str) -> str:
    """What follows the prompt of generation, where the rendered conversation does not begin with its ids."""
    prompt = render_text(tokenizer, turns[:-1], where, add_generation_prompt=True)
    whole = render_text(tokenizer, turns, where)
    if whole.startswith(prompt) and len(whole) > len(prompt):
        return whole[len(prompt) :]
    before = render_text(tokenizer, turns[:-1], where)
    probe = render_text(tokenizer, (*turns[:-1], Turn("assistant", f" {PROBE} ")), where)
    head, found, end = probe.rpartition(PROBE)
    strips = not (head.endswith(" ") and end.startswith(" "))
    if not strips:
        head, end = head[:-1], end[1:]
    if not (found and head.startswith(before) and prompt.startswith(head)):
        raise DataError(
            f"{where}: the tokenizer's chat template does not render the prompt as the beginning of the "
            f"conversation, so that a response cannot be learnt behind the prompt of generation (which ends in "
            f"{prompt[-40:]!r}); use_chat_template=False joins them plainly"
        )
    opened = prompt[len(head) :]
    warn_once(
        f"The chat template opens a response with {opened!r} when it is generated, and leaves that out of a "
        "finished conversation: responses are learnt right behind it, as they are generated, reasoning included."
    )
    response = turns[-1].content
    if opened.strip() and response.lstrip().startswith(opened.strip()):
        response = response.lstrip()[len(opened.strip()) :].lstrip()
    return (response.strip() if strips else response) + end
