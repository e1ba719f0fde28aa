"""Instructions as training examples: tokenised once, prompts masked, padded without touching the tokenizer."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.data.prompts import encode_example
from shifcon_fast.modeling.vocabulary import check_token_ids, padding_id
from shifcon_fast.training.batches.language_column import place_language_ids
from shifcon_fast.training.losses.learnt_tokens import with_learnt

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens that are not learnt; what PyTorch's cross entropy ignores."""


class Example(TypedDict):
    """One tokenised instruction."""

    input_ids: list[int]
    labels: list[int]
    language_id: int


@dataclass(frozen=True)
class ExampleEncoder:
    """Makes an instruction an example. Small and without state, so that ``datasets.map`` can hash and send it.

    Attributes:
        tokenizer: its special tokens are used as they are.
        language_id: the id of a language code; ValueError for an unknown one.
        max_length: tokens kept of an instruction with its response.
        limit: what says so, for messages: "max_length", or the model's context where that is shorter.
        too_long: for longer ones, "truncate" cuts at the end, "drop" leaves them out, "error" raises.
        use_chat_template: see ``data.prompts``.
        embedding_rows: ids that the model has rows for; None does not check.
    """

    tokenizer: Any
    language_id: Callable[[str], int]
    max_length: int
    too_long: str = "truncate"
    use_chat_template: bool = True
    embedding_rows: int | None = None
    limit: str = "max_length"

    def encode(self, instruction: Instruction) -> tuple[Example | None, int]:
        """The example, or None where it is dropped, and the number of tokens it has uncut.

        Raises:
            DataError: too long with "error"; a prompt that alone fills ``max_length``; an unknown language.
            ValueError: a token that the model has no row for. The messages say where the instruction came from.
        """
        encoded = encode_example(self.tokenizer, instruction, use_chat_template=self.use_chat_template)
        labels = [
            token if learn else IGNORED
            for token, learn in zip(encoded.input_ids, encoded.learnt, strict=True)
        ]
        kept = self.fit(encoded.input_ids, labels, instruction.where)
        if kept is None:
            return None, len(labels)
        language_id = self.id_of(instruction.language, instruction.where)
        return Example(input_ids=kept[0], labels=kept[1], language_id=language_id), len(labels)

    def fit(
        self, ids: Sequence[int], labels: Sequence[int], where: str
    ) -> tuple[list[int], list[int]] | None:
        """Token ids and labels cut to ``max_length``; None where they are to be dropped. Raises as ``encode``."""
        if self.embedding_rows is not None:
            check_token_ids(ids, self.tokenizer, self.embedding_rows, where)
        if len(ids) > self.max_length:
            if self.too_long == "error":
                raise DataError(
                    f"{where}: has {len(ids)} tokens; wanted at most {self.max_length} ({self.limit}); "
                    "too_long='truncate' or 'drop' (--too-long) goes on"
                )
            if self.too_long == "drop":
                return None
        kept = list(labels[: self.max_length])
        if all(label == IGNORED for label in kept[1:]):  # the first token is predicted from nothing
            prompt = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
            raise DataError(
                f"{where}: nothing to learn within {self.limit} = {self.max_length} tokens: the prompt "
                f"alone has {prompt}; {self._raise_it()}shorten it"
            )
        return list(ids[: self.max_length]), kept

    def id_of(self, language: str, where: str) -> int:
        """``language_id``, with ``where`` in its error."""
        try:
            return self.language_id(language)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error

    def report(self, total: int, too_long: int) -> None:
        """Say once how many of a data set were too long.

        Raises:
            DataError: nothing is left.
        """
        left_out = self.too_long == "drop"
        if not total:
            raise DataError("the given data holds no rows; wanted at least one")
        if too_long:
            logger.warning(
                "%d of %d instructions have more than %d tokens (%s): %s",
                too_long,
                total,
                self.max_length,
                self.limit,
                "left out" if left_out else "cut at the end",
            )
        if total == (too_long if left_out else 0):
            raise DataError(f"instructions: none is left to train on; {self._raise_it()}shorten them")

    def _raise_it(self) -> str:
        return "raise max_length (--max-length) or " if self.limit == "max_length" else ""


class InstructionDataset(Dataset[Example]):
    """Tokenised instructions in memory, 8 bytes a token.

    Args:
        instructions: as ``read_instructions`` gives them.
        tokenizer, language_id, settings: see :class:`ExampleEncoder`.

    Raises:
        DataError: as :meth:`ExampleEncoder.encode`, or nothing left. The message names the file and the line.
    """

    def __init__(
        self,
        instructions: Iterable[Instruction],
        tokenizer: Any,
        language_id: Callable[[str], int],
        **settings: Any,
    ) -> None:
        self._encode(instructions, ExampleEncoder(tokenizer, language_id, **settings))

    @classmethod
    def of(cls, instructions: Iterable[Instruction], encoder: ExampleEncoder) -> InstructionDataset:
        """The instructions as an encoder makes them."""
        made = cls.__new__(cls)
        made._encode(instructions, encoder)
        return made

    def _encode(self, instructions: Iterable[Instruction], encoder: ExampleEncoder) -> None:
        self._input_ids, self._labels = array("i"), array("i")
        self._ends, self._language_ids = array("q", [0]), array("i")
        total = too_long = 0
        for instruction in instructions:
            example, length = encoder.encode(instruction)
            total += 1
            too_long += length > encoder.max_length
            if example is not None:
                self._input_ids.extend(example["input_ids"])
                self._labels.extend(example["labels"])
                self._ends.append(len(self._labels))
                self._language_ids.append(example["language_id"])
        encoder.report(total, too_long)

    @property
    def language_ids(self) -> Sequence[int]:
        """Of each example."""
        return self._language_ids

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max((end - start for start, end in pairwise(self._ends)), default=0)

    def __len__(self) -> int:
        return len(self._language_ids)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        tokens = slice(self._ends[index], self._ends[index + 1])
        return Example(
            input_ids=self._input_ids[tokens].tolist(),
            labels=self._labels[tokens].tolist(),
            language_id=self._language_ids[index],
        )


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, T) int64, T the longest row. On the right whatever the tokenizer prefers: positions then start at 0."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


class InstructionCollator:
    """Pads examples to a batch: input_ids, attention_mask, labels (B, T) and language_ids (B,).

    Examples may have an ``attention_mask``; ids per token (``language_ids``, a list) give (B, T).

    Args:
        tokenizer: whose padding token fills up, if the model has a row for it; None fills up with 0.
        embedding_rows: ids that the model has rows for; None takes every id to have one.
        count_learnt: also count the learnt tokens (:mod:`.learnt_tokens`), so that no device is asked for them. For
            the trainer, which takes them out again before the model gets the batch.
    """

    def __init__(
        self, tokenizer: Any, embedding_rows: int | None = None, *, count_learnt: bool = False
    ) -> None:
        self._count_learnt = count_learnt
        self._filler = 0 if tokenizer is None else padding_id(tokenizer, embedding_rows)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [example["input_ids"] for example in examples]
        masks = [
            example.get("attention_mask", [1] * len(row)) for example, row in zip(examples, ids, strict=True)
        ]
        batch = {
            "input_ids": pad_right(ids, self._filler),
            "attention_mask": pad_right(masks, 0),
            "labels": pad_right([example["labels"] for example in examples], IGNORED),
        }
        batch["language_ids"] = place_language_ids(examples, tuple(batch["labels"].shape))
        return with_learnt(batch) if self._count_learnt else batch
