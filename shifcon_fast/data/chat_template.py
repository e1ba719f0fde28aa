"""What a tokenizer's chat template makes of a conversation: token ids, refusals, and what ends a turn."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Turn

logger = logging.getLogger(__name__)

PROBE = "RESPONSE"
"""A response whose place in a rendered conversation shows what the template puts around it."""

NOTHING_ENDS_A_TURN = (
    "Nothing ends a response: the chat template puts no special token behind one (without a template: the "
    "tokenizer has no EOS token), so that answers run on to the limit of new tokens. Set tokenizer.eos_token, and "
    "have the template put {{ eos_token }} behind an assistant's message."
)

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def render_ids(
    tokenizer: Any, turns: Sequence[Turn], where: str, *, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation.

    Raises:
        DataError: the template refuses it; the message has ``where``, what the template said and what can be done.
    """
    settings = {"add_generation_prompt": add_generation_prompt, "tokenize": True, "return_dict": True}
    return list(_apply(tokenizer, turns, where, settings)["input_ids"])


def render_text(
    tokenizer: Any, turns: Sequence[Turn], where: str, *, add_generation_prompt: bool = False
) -> str:
    """Like :func:`render_ids`, before it is tokenised."""
    settings = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
    return str(_apply(tokenizer, turns, where, settings))


def assistant_mask(tokenizer: Any, turns: Sequence[Turn], where: str) -> list[bool] | None:
    """Which ids of a conversation the template marks as an assistant's (``{% generation %}``), or None."""
    template = tokenizer.chat_template
    if not (isinstance(template, str) and _GENERATION_MARKER.search(template) and tokenizer.is_fast):
        return None
    settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    return [bool(mark) for mark in _apply(tokenizer, turns, where, settings)["assistant_masks"]]


def end_of_turn(tokenizer: Any, *, use_chat_template: bool = True) -> list[int]:
    """The token that ends an assistant's turn, as a list of one id; empty if none does.

    With a chat template it is the first special token that the template puts behind a response: ``<|im_end|>`` in
    ChatML, whatever the tokenizer's EOS token is. Without one it is the EOS token, which ``encode_example`` adds.
    """
    if not (use_chat_template and has_template(tokenizer)):
        return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    try:
        text = render_text(
            tokenizer, (Turn("user", "Q"), Turn("assistant", PROBE)), "a question and its answer"
        )
    except DataError as error:
        logger.warning("What ends a turn is unknown: %s", error)
        return []
    _, found, end = text.rpartition(PROBE)
    if not found:  # a template for other contents than text, for instance
        return []
    behind = tokenizer(end, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids}
    special |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [int(token_id) for token_id in behind if token_id in special][:1]


def stopping_ids(generation_config: Any, ends: Sequence[int]) -> list[int]:
    """What ends generation: ``ends``, and the EOS ids that the model has of its own (often several)."""
    own = getattr(generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys(int(token_id) for token_id in (*ends, *own)))


def _apply(tokenizer: Any, turns: Sequence[Turn], where: str, settings: dict[str, Any]) -> Any:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, **settings)
    except (jinja2.TemplateError, ValueError) as error:
        raise DataError(
            f"{where}: the tokenizer's chat template refuses the conversation, saying {str(error)!r}; "
            f"{_advice(turns)}use_chat_template=False joins the messages without the template"
        ) from error


def _advice(turns: Sequence[Turn]) -> str:
    roles = [turn.role for turn in turns]
    advice = ""
    if "system" in roles:
        advice += (
            "if it knows no system message, put its text in front of the first user message or leave it out; "
        )
    spoken = [role for role in roles if role != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2):
        advice += "if it wants user and assistant in turns, join neighbouring messages of one role; "
    return advice
