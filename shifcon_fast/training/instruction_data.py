"""Instructions as training examples: tokenised once, prompts masked, padded without touching the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.data.prompts import encode_example
from shifcon_fast.modeling.vocabulary import check_token_ids, padding_id

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens that are not learnt; what PyTorch's cross entropy ignores."""


class Example(TypedDict):
    """One tokenised instruction."""

    input_ids: list[int]
    labels: list[int]
    language_id: int


class InstructionDataset(Dataset[Example]):
    """Tokenised instructions.

    Args:
        instructions: as ``read_instructions`` gives them.
        tokenizer: its special tokens are used as they are.
        language_id: the id of a language code; ValueError for an unknown one.
        max_length: tokens kept of an instruction with its response.
        too_long: for longer ones, "truncate" cuts at the end, "drop" leaves them out, "error" raises.
        use_chat_template: see ``data.prompts``.
        embedding_rows: ids that the model has rows for; None does not check.

    Raises:
        DataError: too long with "error"; a prompt that alone fills ``max_length``; an unknown language; nothing
            left. The message names the file and the line.
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        tokenizer: Any,
        language_id: Callable[[str], int],
        *,
        max_length: int,
        too_long: str = "truncate",
        use_chat_template: bool = True,
        embedding_rows: int | None = None,
    ) -> None:
        self._examples: list[Example] = []
        shortened = 0
        for instruction in instructions:
            encoded = encode_example(tokenizer, instruction, use_chat_template=use_chat_template)
            if embedding_rows is not None:
                check_token_ids(encoded.input_ids, tokenizer, embedding_rows, instruction.where)
            length = len(encoded.input_ids)
            if length > max_length:
                shortened += 1
                if too_long == "error":
                    raise DataError(
                        f"{instruction.where}: has {length} tokens; wanted at most {max_length} (max_length, or "
                        "the model's context); too_long='truncate' or 'drop' (--too-long) goes on"
                    )
                if too_long == "drop":
                    continue
            learnt = encoded.learnt[:max_length]
            if not any(learnt[1:]):  # the first token is predicted from nothing
                raise DataError(
                    f"{instruction.where}: nothing to learn within max_length = {max_length} tokens: the prompt "
                    f"alone has {encoded.learnt.index(True)}; raise max_length (--max-length) or shorten it"
                )
            ids = encoded.input_ids[:max_length]
            labels = [token if learn else IGNORED for token, learn in zip(ids, learnt, strict=True)]
            try:
                self._examples.append(
                    Example(input_ids=ids, labels=labels, language_id=language_id(instruction.language))
                )
            except ValueError as error:
                raise DataError(f"{instruction.where}: {error}") from error
        if shortened:
            logger.warning(
                "%d of %d instructions have more than %d tokens (max_length): %s",
                shortened,
                len(instructions),
                max_length,
                "left out" if too_long == "drop" else "cut at the end",
            )
        if not self._examples:
            raise DataError("instructions: none is left to train on; raise max_length (--max-length)")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, T) int64, T the longest row. On the right whatever the tokenizer prefers: positions then start at 0."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


class InstructionCollator:
    """Pads examples to a batch: input_ids, attention_mask, labels (B, T) and language_ids (B,).

    Args:
        tokenizer: whose padding token fills up, if the model has a row for it.
        embedding_rows: ids that the model has rows for; None takes every id to have one.
    """

    def __init__(self, tokenizer: Any, embedding_rows: int | None = None) -> None:
        self._filler = padding_id(tokenizer, embedding_rows)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad_right(ids, self._filler),
            "attention_mask": pad_right([[1] * len(row) for row in ids], 0),
            "labels": pad_right([example["labels"] for example in examples], IGNORED),
            "language_ids": torch.tensor([example["language_id"] for example in examples]),
        }
