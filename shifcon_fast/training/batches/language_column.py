"""The language of each example on its way into a batch, whatever makes the batch of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shifcon_fast.data.errors import DataError

PER_EXAMPLE, PER_TOKEN = "language_id", "language_ids"
"""Columns of a prepared data set: an id, or a list of one id per token."""


class LanguageCollator:
    """Has any collator's batches hold ``language_ids``, which it would drop or choke on.

    Args:
        collator: called with the examples without their language columns. Its batch may have a row per example, or
            all examples in one row, one after the other (padding-free).
        repeats: how often the batch holds all its examples; 2 for chosen answers and then rejected ones.
    """

    def __init__(self, collator: Callable[..., Any], *, repeats: int = 1) -> None:
        self.collator = collator
        self._repeats = repeats

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's batch and ``language_ids``, (B,) or (B, T)."""
        columns = (PER_EXAMPLE, PER_TOKEN)
        bare = [{name: value for name, value in each.items() if name not in columns} for each in examples]
        batch = dict(self.collator(bare))
        shape = tuple(batch["input_ids"].shape[:2])
        ids = place_language_ids(examples, shape, repeats=self._repeats)
        mask = batch.get("attention_mask")
        if ids.dim() == 2 and mask is not None and bool((mask[:, 0] == 0).any()):
            raise DataError(
                "data_collator: pads on the left; wanted padding on the right, where ids are per token"
            )
        return {**batch, PER_TOKEN: ids}


def place_language_ids(
    examples: Sequence[Mapping[str, Any]], shape: tuple[int, ...], *, repeats: int = 1
) -> Tensor:
    """Language ids for a batch of ``shape`` (B, T) that was made of the examples, right-padded.

    Returns:
        (B,) int64, one id per row; (B, T) where rows hold several languages, -1 on padding.

    Raises:
        DataError: an example without a language id; a batch that its examples cannot be found in.
    """
    rows, tokens = shape
    ids = [_language_of(example) for example in examples]
    if all(isinstance(each, int) for each in ids) and rows == repeats * len(ids):
        return torch.tensor(ids * repeats)
    lists = [
        each if not isinstance(each, int) else [each] * len(example["input_ids"])
        for each, example in zip(ids, examples, strict=True)
    ]
    if rows == 1:
        lists = [[each for row in lists for each in row]]
    if rows != len(lists) or max(map(len, lists)) > tokens:
        raise DataError(
            f"data_collator: made a batch of shape {shape} of {len(ids)} examples; wanted a row per example, or "
            "all in one row, to know which language is where"
        )
    return torch.tensor([[*row, *[-1] * (tokens - len(row))] for row in lists])


def _language_of(example: Mapping[str, Any]) -> int | list[int]:
    value = example.get(PER_TOKEN, example.get(PER_EXAMPLE))
    if value is None:
        raise DataError(
            f"an example: has {', '.join(map(repr, example))}; wanted {PER_EXAMPLE!r}, one of the model's language "
            "ids (handle.language_ids([code])), or -1 for none"
        )
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    return value if isinstance(value, int) else list(value)
