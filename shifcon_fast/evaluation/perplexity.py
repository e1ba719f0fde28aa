"""Perplexity of a causal language model on whole sentences, one number a language.

PPL = exp(Σ NLL / Σ predicted tokens), both sums over all sentences of the language: a token counts the same
whatever sentence or batch it is in (a mean of per-batch losses does not have this property). Every token but
the first is predicted, so with a BOS token every content token is; log-softmax in float32.

Perplexities compare models on one language and tokenizer. Across languages they compare the tokenizer as
well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from shifcon_fast.evaluation.sentences import input_device, sentence_batches
from shifcon_fast.modeling.attachment import unshifted
from shifcon_fast.modeling.handle import ShiftHandle


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihood (nats) and predicted tokens of every sentence, in the order of the data."""

    nll: list[float]
    tokens: list[int]

    def __post_init__(self) -> None:
        if len(self.nll) != len(self.tokens) or sum(self.tokens) < 1 or min(self.tokens) < 0:
            raise ValueError("tokens: wanted a number for each nll, and one or more in all")

    @property
    def value(self) -> float:
        """exp(Σ NLL / Σ tokens); infinity where that exceeds a float."""
        try:
            return math.exp(math.fsum(self.nll) / sum(self.tokens))
        except OverflowError:
            return math.inf


@torch.no_grad()
def measure_perplexity(
    model: nn.Module,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    language: str,
    handle: ShiftHandle | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Perplexity:
    """Score the sentences of one language, shifted where a handle is given and unshifted without one.

    Raises:
        ValueError: no sentence has a token to predict.
    """
    nll, tokens = [0.0] * len(sentences), [0] * len(sentences)
    bar = tqdm(total=len(sentences), desc=f"perplexity {language}", disable=not progress, leave=False)
    what = f"parallel[{language!r}]"
    for batch in sentence_batches(model, tokenizer, sentences, batch_size=batch_size, what=what):
        extra = {}
        if handle is not None:
            extra["language_ids"] = handle.language_ids([language] * len(batch.rows)).to(input_device(model))
        with unshifted(model) if handle is None else nullcontext():
            output = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **extra
            )
        lengths = batch.attention_mask.sum(dim=1).tolist()
        for row, (index, length) in enumerate(zip(batch.rows, lengths, strict=True)):
            # one sentence at a time: the float32 copy of a batch's logits would be the largest tensor of all
            logits = output.logits[row, : length - 1].float()
            targets = batch.input_ids[row, 1:length].to(logits.device)
            nll[index] = (
                float(functional.cross_entropy(logits, targets, reduction="sum")) if length > 1 else 0.0
            )
            tokens[index] = length - 1
        bar.update(len(batch.rows))
    bar.close()
    if not sum(tokens):
        raise ValueError(
            f"{what}: no sentence has a token to predict; wanted sentences of two tokens or more"
        )
    return Perplexity(nll, tokens)
