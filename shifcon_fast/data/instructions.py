"""Instruction data: a prompt and its response, or a conversation, each in one language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.row import Row, check_text
from shifcon_fast.data.rows import Source, read_rows

Role = Literal["system", "user", "assistant"]
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Instruction:
    """A conversation in one language, ending in an assistant's turn; ``where`` says where it came from."""

    language: str
    turns: tuple[Turn, ...]
    where: str = "an instruction"

    @staticmethod
    def single(language: str, prompt: str, response: str, where: str = "an instruction") -> Instruction:
        """A prompt and its response."""
        return Instruction(language, (Turn("user", prompt), Turn("assistant", response)), where)


def read_instructions(
    source: Source | Sequence[Instruction], language_field: str = "lang"
) -> list[Instruction]:
    """Read instructions from whatever :func:`~shifcon_fast.data.rows.read_rows` reads, or take ready ones.

    Each row is ``{"lang": "sw", "prompt": "...", "response": "..."}`` or ``{"lang": "sw", "messages": [...]}`` with
    messages ``{"role": "user", "content": "..."}``. The language may be in another field than ``lang``.

    Raises:
        DataError: a row of another form, empty text, an unknown role, a conversation without a response at its end.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            raise DataError("instructions: got an empty sequence; wanted at least one")
        if all(isinstance(item, Instruction) for item in source):
            return [item for item in source if isinstance(item, Instruction)]
    return [parse_instruction(row, language_field) for row in read_rows(source)]  # type: ignore[arg-type]


def parse_instruction(row: Row, language_field: str = "lang") -> Instruction:
    """One row of instruction data, as :func:`read_instructions` describes it, its language in ``language_field``.

    Raises:
        DataError: a row of another form.
    """
    wanted = f"wanted {language_field!r}, 'prompt' and 'response', or {language_field!r} and 'messages'"
    if row.value.get(language_field) is None:
        raise DataError(
            f"{row.where}: {language_field!r} is null; has {', '.join(map(repr, row.value))}; {wanted}"
        )
    language = check_text(row.value[language_field], row.where, repr(language_field))
    messages = row.value.get("messages")
    if messages is not None:
        return Instruction(language, _parse_messages(messages, row.where), row.where)
    if row.value.get("prompt") is None or row.value.get("response") is None:
        raise DataError(f"{row.where}: has {', '.join(map(repr, row.value))}; {wanted}")
    return Instruction.single(
        language,
        check_text(row.value["prompt"], row.where, "'prompt'"),
        check_text(row.value["response"], row.where, "'response'"),
        row.where,
    )


def _parse_messages(messages: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where}: 'messages' is {type(messages).__name__}; wanted a list of messages")
    turns = []
    for index, message in enumerate(messages):
        what = f"'messages'[{index}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(
                f"{where}: {what} is {str(message)[:60]}; wanted 'content' and a 'role' of {_ROLES}"
            )
        turns.append(Turn(message["role"], check_text(message.get("content"), where, f"{what}['content']")))
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise DataError(
            f"{where}: 'messages' ends with role {turns[-1].role!r}; wanted 'assistant' at its end"
        )
    return tuple(turns)
