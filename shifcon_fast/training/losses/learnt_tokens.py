"""Which tokens of a batch are learnt, counted on the host where the labels are made.

The loss without logits must know how many tokens there are, and of which language, before it can ask a device for
them. To ask the device (a mask as index, ``nonzero``, ``unique``) is to wait for all that it still has to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shifcon_fast.training.losses.language_losses import IGNORED

LEARNT = "learnt_tokens"
"""The key of a batch under which a collator puts them, for the trainer alone: no model takes it."""


class Runs(NamedTuple):
    """Languages of tokens that lie one language after the other.

    Attributes:
        ids: (G,) int64, ascending; -1 is none.
        counts: (G,) int64, the tokens of each, on the device of the tokens.
        sizes: the same numbers, on the host.
    """

    ids: Tensor
    counts: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, ids: Tensor) -> Runs:
        """Count (n,) languages, sorted; on a device this waits for it."""
        found, counts = torch.unique_consecutive(ids, return_counts=True)
        return cls(found, counts, counts.tolist())


@dataclass(frozen=True)
class LearntTokens:
    """The learnt tokens of a batch.

    Attributes:
        shape: (B, T), that of the labels.
        places: (n,) int64, where they are among the B · (T-1) predictions, one language after the other.
        languages: theirs; None where there are none.
    """

    shape: tuple[int, int]
    places: Tensor
    languages: Runs | None

    @classmethod
    def of(cls, labels: Tensor, language_ids: Tensor | None = None) -> LearntTokens:
        """Count; on a device this waits for it.

        Args:
            labels: (B, T) int64, -100 is not learnt.
            language_ids: (B,) or (B, T).
        """
        rows, length = labels.shape
        places = (labels[:, 1:] != IGNORED).flatten().nonzero()[:, 0]
        if language_ids is None:
            return cls((rows, length), places, None)
        ids = language_ids[:, None].expand(rows, length) if language_ids.dim() == 1 else language_ids
        ordered = ids[:, 1:].flatten()[places].sort(stable=True)
        return cls((rows, length), places[ordered.indices], Runs.of(ordered.values))

    def to(self, device: Any, non_blocking: bool = False) -> LearntTokens:
        """Moved to a device, as accelerate moves whatever has this method."""
        return self._with(lambda each: each.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LearntTokens:
        """In pinned memory, as a ``DataLoader`` pins whatever has this method."""
        return self._with(lambda each: each.pin_memory())

    def _with(self, change: Any) -> LearntTokens:
        runs = self.languages
        if runs is not None:
            runs = Runs(change(runs.ids), change(runs.counts), runs.sizes)
        return replace(self, places=change(self.places), languages=runs)


def take_learnt(inputs: dict[str, Any]) -> LearntTokens | None:
    """Take what a collator counted out of a batch, if it is still that of its labels."""
    learnt, labels = inputs.pop(LEARNT, None), inputs.get("labels")
    fits = isinstance(learnt, LearntTokens) and labels is not None and learnt.shape == tuple(labels.shape)
    return learnt if fits else None


def with_learnt(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the host with its learnt tokens counted."""
    return {**batch, LEARNT: LearntTokens.of(batch["labels"], batch.get("language_ids"))}
