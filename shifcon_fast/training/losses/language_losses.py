"""The generation loss of each language: exact sums over its tokens, kept on the device until they are logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
_CHUNK = 2**24  # logits looked at in one go: 64 MiB in float32

OTHER = "other"
"""What rows are logged as that have no language (id -1)."""


class TokenLosses(NamedTuple):
    """What predicting each token cost, without a graph.

    Attributes:
        nll: (B, T-1) float32, nats for tokens 1 … T-1; 0 where nothing is learnt.
        learnt: (B, T-1) bool.
    """

    nll: Tensor
    learnt: Tensor


class LanguageSums(NamedTuple):
    """What predicting the tokens of each language cost, without a graph.

    Attributes:
        ids: (G,) int64, the languages; -1 is none.
        losses: (G,), their summed nats.
        tokens: (G,), how many were learnt.
    """

    ids: Tensor
    losses: Tensor
    tokens: Tensor


def token_losses(logits: Tensor, labels: Tensor) -> TokenLosses:
    """-log p of each label, from logits that are there anyway: read once more in chunks, none of them copied whole.

    Args:
        logits: (B, T, V), the model's output as it is; longer ones (virtual tokens) are cut in front.
        labels: (B, T) int64; -100 is not learnt.
    """
    targets = labels[:, 1:].to(logits.device)
    chunk = max(1, _CHUNK // logits.shape[-1])
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
    with torch.no_grad():
        for row, target, out in zip(logits[:, -labels.shape[1] : -1], targets, nll, strict=True):
            for part in range(0, len(target), chunk):
                here = slice(part, part + chunk)
                out[here] = functional.cross_entropy(
                    row[here].float(), target[here], ignore_index=IGNORED, reduction="none"
                )
    return TokenLosses(nll, targets != IGNORED)


class LanguageLosses:
    """Sums a run's token losses by language, and gives their means.

    Nothing is read back to the host before :meth:`drain`.

    Args:
        languages: their names, in the order of their ids.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        self._names = (*languages, OTHER)
        self._sums: Tensor | None = None

    def rows(self, losses: TokenLosses | LanguageSums, language_ids: Tensor) -> Tensor:
        """The sums of each row of a batch: (B, 2, K+1), losses and tokens by language, -1 in the last place.

        Args:
            losses: of the batch; those by language make one row.
            language_ids: (B,) or, where rows hold several languages, (B, T).
        """
        if isinstance(losses, LanguageSums):
            return self._one_row(losses)
        nll, learnt = losses
        ids = language_ids.to(nll.device)
        ids = ids[:, None].expand(nll.shape) if ids.dim() == 1 else ids[:, 1:]
        values = torch.stack([nll, learnt.float()], dim=1).to(_exact(nll.device))
        places = torch.where(ids < 0, len(self._names) - 1, ids)[:, None].expand(values.shape)
        empty = values.new_zeros(nll.shape[0], 2, len(self._names))
        return empty.scatter_add_(2, places, values)

    def _one_row(self, sums: LanguageSums) -> Tensor:
        ids = torch.where(sums.ids < 0, len(self._names) - 1, sums.ids)
        values = torch.stack([sums.losses, sums.tokens]).to(_exact(ids.device))
        empty = values.new_zeros(2, len(self._names))
        return empty.index_add_(1, ids, values)[None]

    def add(self, rows: Tensor) -> None:
        """Add what :meth:`rows` gave of a batch."""
        total = rows.sum(0)
        self._sums = total if self._sums is None else self._sums + total

    def drain(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean loss per token of each language that had any since the last call, and start again.

        Args:
            add_up: sums a tensor over processes, which all call this.
        """
        if self._sums is None:
            return {}
        losses, tokens = add_up(self._sums).tolist()
        self._sums = None
        return {
            name: loss / count for name, loss, count in zip(self._names, losses, tokens, strict=True) if count
        }


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which has none of 64 bits
