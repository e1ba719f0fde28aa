"""Batches of sentences: tokenised once, sorted by length, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shifcon_fast.modeling.vocabulary import check_token_ids, embedding_rows, padding_id


@dataclass(frozen=True)
class SentenceBatch:
    """``rows`` are the sentences' places in the list; input_ids and attention_mask are (B, T) int64."""

    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor


def sentence_batches(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], *, batch_size: int, what: str
) -> Iterator[SentenceBatch]:
    """Batches of similar lengths, longest first (a batch that does not fit in memory fails at once).

    A sentence is encoded as the tokenizer does by default, so with BOS where it adds one. Padding is masked,
    and its id is of no consequence.

    Args:
        what: how to call the sentences in an error, such as ``parallel['sw']``.

    Raises:
        ValueError: a sentence without tokens, or longer than the model's context.
    """
    encoded = [list(ids) for ids in tokenizer(list(sentences))["input_ids"]]
    limit = context_length(model)
    rows_of_model = embedding_rows(model)
    for index, ids in enumerate(encoded):
        check_token_ids(ids, tokenizer, rows_of_model, f"{what}[{index}]")
        if not ids:
            raise ValueError(
                f"{what}[{index}] is {sentences[index]!r}, which has no tokens; wanted a sentence"
            )
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"{what}[{index}] has {len(ids)} tokens; the model's context holds {limit}: shorten or drop it"
            )
    device = input_device(model)
    padding = padding_id(tokenizer, rows_of_model)
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = len(encoded[rows[0]])
        input_ids = torch.full((len(rows), longest), padding, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, index in enumerate(rows):
            input_ids[row, : len(encoded[index])] = torch.tensor(encoded[index])
            mask[row, : len(encoded[index])] = 1
        yield SentenceBatch(rows, input_ids.to(device), mask.to(device))


def context_length(model: Any) -> int | None:
    """The number of positions of the model, where its configuration says so."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return int(limit) if limit else None


def input_device(model: Any) -> torch.device:
    """Where the model takes its token ids (the embedding's device; offloaded weights are on ``meta``)."""
    weight = model.get_input_embeddings().weight
    return torch.device("cpu") if weight.device.type == "meta" else weight.device
