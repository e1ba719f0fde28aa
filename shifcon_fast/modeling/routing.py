"""``language = "auto"``: the rows of a pass find their own language at boundary f, and keep it from then on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shifcon_fast import ops
from shifcon_fast.modeling.content import content_mask, ordinary_tokens
from shifcon_fast.space.language_shift import LanguageShift

_KEPT = "_shifcon_language_ids"  # of a key-value cache: the ids of its rows


class Routing:
    """One pass of the decoder. Its ids are -1 until the block at boundary f decides them, in place.

    Args:
        shift: has a router.
        first: row of the tables where the shift's languages begin.
        threshold: rows whose likeliest language is less likely than this are left alone.
        tokens: the pass's input, (B, T) ids or (B, T, d) embeddings.
        arguments: what the decoder was called with; a cache among them that holds the ids of an earlier pass says
            them, and nothing is decided again.
    """

    def __init__(
        self,
        shift: LanguageShift,
        first: int,
        threshold: float,
        tokens: Tensor,
        arguments: Mapping[str, Any],
    ) -> None:
        self.block = shift.blocks[0]
        self.detected: tuple[Tensor, Tensor] | None = None
        self._shift, self._first, self._threshold = shift, first, threshold
        self._mask: Tensor | None = None
        cache = _cache_of(arguments)
        kept = getattr(cache, _KEPT, None)
        if kept is not None and _goes_on(cache, tokens):
            self.ids = _for_batch(kept, tokens.shape[0]).to(tokens.device)
            return
        self.ids = torch.full((tokens.shape[0],), -1, dtype=torch.long, device=tokens.device)
        self._mask = _candidates(tokens, arguments.get("attention_mask"), _special_ids(shift))

    def decide(self, hidden_states: Tensor) -> None:
        """Fill in the ids, from the (B, T, d) hidden states at boundary f before the shift."""
        if self._mask is None:
            return
        mask, *_ = ordinary_tokens(hidden_states, self._mask.to(hidden_states.device))
        with torch.no_grad():
            means = ops.masked_mean_pool(hidden_states.detach(), mask)
            assert self._shift.router is not None
            likely = self._shift.router.probabilities(means).max(dim=-1)
        sure = (likely.values >= self._threshold) & mask.any(dim=1)
        moved = sure if self._shift.moves_pivot else sure & (likely.indices != self._shift.pivot_id)
        self.detected = likely.indices, torch.where(mask.any(dim=1), likely.values, 0.0)
        self.ids.copy_(torch.where(moved, likely.indices + self._first, -1))

    def keep(self, arguments: Mapping[str, Any], output: Any) -> None:
        """Have the cache of this pass know its ids, for the passes that go on with it."""
        for cache in (_cache_of(arguments), getattr(output, "past_key_values", None)):
            if cache is not None:
                setattr(cache, _KEPT, self.ids)


def _cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache; transformers 5.24 renames the argument."""
    cache = arguments.get("past_key_values")
    return arguments.get("cache") if cache is None else cache


def _goes_on(cache: Any, tokens: Tensor) -> bool:
    """Whether a cache that knows ids holds earlier tokens of these rows; static ones begin again, emptied."""
    length = cache.get_seq_length()
    if isinstance(length, int):
        return length > 0
    if torch.compiler.is_compiling():
        return tokens.shape[1] == 1
    return bool(length > 0)


def _for_batch(ids: Tensor, batch: int) -> Tensor:
    if batch % len(ids):
        raise ValueError(
            f"language: the cache is of {len(ids)} rows, and this pass has {batch}; wanted the same rows"
        )
    return ids.repeat_interleave(batch // len(ids))


def _special_ids(shift: LanguageShift) -> list[int]:
    tokenizer = shift.provenance.get("tokenizer")
    return list(tokenizer.get("special_ids", ())) if isinstance(tokenizer, Mapping) else []


def _candidates(tokens: Tensor, attention_mask: Any, special_ids: list[int]) -> Tensor:
    """(B, T) bool, the tokens that may be content; embeddings have no ids, so none of theirs is special."""
    batch, length = tokens.shape[:2]
    attended = _attended(attention_mask, length)
    if tokens.dim() == 3:
        tokens, special_ids = tokens.new_zeros(batch, length, dtype=torch.long), []
    return content_mask(tokens, None if attended is None else attended.to(tokens.device), special_ids)


def _attended(attention_mask: Any, length: int) -> Tensor | None:
    """(B, T), from a 2-D mask or the last query's row of a 4-D one, as ``generate`` makes for static caches."""
    if isinstance(attention_mask, Mapping):
        attention_mask = next(iter(attention_mask.values()), None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 4:
        row = attention_mask[:, 0, -1, :length]
        return row if row.dtype == torch.bool else row == 0
    return attention_mask[:, -length:]
