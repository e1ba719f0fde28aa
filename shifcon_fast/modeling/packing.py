"""Sentences of different lengths in rows without padding: several in one row, each attending to itself alone.

A batch of short and long sentences is padded to the longest, and every product of the model is formed for the
padding too. Packed, the short ones share rows (best fit, longest first), as in Krell et al. 2021
(https://arxiv.org/abs/2107.02027). Positions begin again with each sentence; from that transformers makes the mask
that keeps them apart, or has FlashAttention take their lengths. No row is longer than the longest sentence, so
attention costs no more than it does with padding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from shifcon_fast import ops
from shifcon_fast.modeling.architectures import Decoder
from shifcon_fast.notices import warn_once

_WORTH_IT = 0.95  # of the padded batch's places; the mask that keeps sentences apart is not free
_MASKED = ("eager", "sdpa")
# Before 5.23 transformers counts the chunks of chunked attention from the start of a row, not of each sentence.
_CHUNKS_OF_SENTENCES = hasattr(masking_utils, "packed_sequence_compatibility_function")


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B sentences stand in R rows of T places.

    Attributes:
        source: (R, T) int64, whose token stands in a place: a place of the flattened padded batch; 0 where the
            place is left over.
        position_ids: (R, T) int64, from 0 in each sentence, and in what is left over at the end of a row.
        sentence: (R, T) int64, the sentence a place belongs to; B where it is left over.
        tokens: (B, T) int64, the places of each sentence's tokens in the flattened rows; 0 behind its end.
        slots: rows are in the order of how many sentences they hold, the most first, so that those with a j-th one
            come first: of each j, (n_j,) int64, the j-th sentences of rows 0 … n_j-1.
        order: (B,) int64, where each sentence is when the slots stand one after the other.
        flat: the model gets the rows as one, (1, R · T): FlashAttention takes the lengths of one row's sentences.
    """

    source: Tensor
    position_ids: Tensor
    sentence: Tensor
    tokens: Tensor
    slots: tuple[Tensor, ...]
    order: Tensor
    flat: bool = False

    def to(self, device: torch.device) -> Packing:
        """The same on a device."""
        names = ("source", "position_ids", "sentence", "tokens", "order")
        moved: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        return replace(self, **moved, slots=tuple(to_device(slot, device) for slot in self.slots))

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T) values of tokens as (R, T); what stands in the places left over means nothing."""
        return padded.flatten()[self.source]

    def of_sentences(self, values: Tensor, filler: Any) -> Tensor:
        """(B,) values as those of the places, (R, T); ``filler`` in the places left over."""
        return torch.cat([values, values.new_full((1,), filler)])[self.sentence]

    def unpack(self, values: Tensor) -> Tensor:
        """(R, T) values of places as (B, T); behind a sentence's end they mean nothing."""
        return values.flatten()[self.tokens]

    def given(self, rows: Tensor) -> Tensor:
        """(R, T) as the model gets it."""
        return rows.reshape(1, -1) if self.flat else rows

    def rows(self, hidden_states: Tensor) -> Tensor:
        """What the model gives, as (R, T, d)."""
        return hidden_states.view(*self.source.shape, -1) if self.flat else hidden_states

    def means(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """``ops.masked_mean_pool`` of each sentence: (B, d).

        Args:
            hidden_states: (R, T, d).
            mask: (R, T) bool, False in the places left over.
        """
        means: Tensor = _SentenceMeans.apply(hidden_states, mask, self)
        return means


def packing_of(attention_mask: Tensor | None, decoder: Decoder) -> Packing | None:
    """How to pack a batch; None where padding stays.

    It stays where there is next to none; where the mask is on an accelerator (reading the lengths would wait for
    it) or is not that of a batch padded on the right; and where the decoder cannot keep sentences in one row apart:
    see ``Architecture.packs``, attention in chunks before transformers 5.23, and attention implementations that are
    not transformers' own, which is said once.

    Args:
        attention_mask: (B, T), of the padded batch.
        decoder: what will run.
    """
    if attention_mask is None or attention_mask.device.type != "cpu":
        return None
    attended = attention_mask != 0
    lengths = attended.sum(dim=1)
    longest = attended.shape[1]
    if not torch.equal(attended, torch.arange(longest) < lengths[:, None]) or not lengths.all():
        return None
    sizes: list[int] = lengths.tolist()
    if sum(sizes) > _WORTH_IT * longest * len(sizes) or not decoder.architecture.packs:
        return None
    chunk = getattr(decoder.module.config, "attention_chunk_size", None) or longest
    if chunk < longest and not _CHUNKS_OF_SENTENCES:
        return None
    attention = str(getattr(decoder.module.config, "_attn_implementation", ""))
    flat = attention.startswith("flash_attention")
    if not flat and attention not in _MASKED:
        warn_once(
            f"Contrastive batches are padded: whether the attention {attention!r} keeps sentences that share a row "
            f"apart is not known. Wanted one of {', '.join(_MASKED)} or a flash_attention to pack them."
        )
        return None
    rows = best_fit(sizes, longest)
    if len(rows) * longest > _WORTH_IT * longest * len(sizes):
        return None
    return _lay_out(rows, sizes, longest, flat)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sentences whose sizes add up to ``capacity`` at most, the longest first, each where it fits best.

    Rows with the most sentences come first.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (places left, row), the fewest first
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        at = bisect_left(room, (size, 0))
        if at == len(room):
            rows.append([index])
            insort(room, (capacity - size, len(rows) - 1))
        else:
            left, row = room.pop(at)
            rows[row].append(index)
            insort(room, (left - size, row))
    return sorted(rows, key=len, reverse=True)


def _lay_out(rows: Sequence[Sequence[int]], sizes: Sequence[int], length: int, flat: bool) -> Packing:
    count = len(sizes)
    source = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(source)
    sentence = torch.full_like(source, count)
    tokens = torch.zeros(count, length, dtype=torch.long)
    each = torch.arange(length)
    for row, sentences in enumerate(rows):
        start = 0
        for index in sentences:
            here = slice(start, start + sizes[index])
            source[row, here] = index * length + each[: sizes[index]]
            positions[row, here] = each[: sizes[index]]
            sentence[row, here] = index
            tokens[index, : sizes[index]] = row * length + start + each[: sizes[index]]
            start += sizes[index]
        positions[row, start:] = each[: length - start]
    most = len(rows[0])
    slots = [[sentences[slot] for sentences in rows if slot < len(sentences)] for slot in range(most)]
    order = torch.tensor([index for slot in slots for index in slot]).argsort()
    return Packing(source, positions, sentence, tokens, tuple(map(torch.tensor, slots)), order, flat)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device, without waiting for what the device has to do."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(device, non_blocking=True)
    return tensor.to(device)


class _SentenceMeans(torch.autograd.Function):
    """A pass of the operator for each slot, and one gradient of all of them."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, mask: Tensor, packing: Packing) -> Tensor:
        found = []
        for sentences in packing.slots:
            rows = len(sentences)
            mine = mask[:rows] & (packing.sentence[:rows] == sentences[:, None])
            found.append(ops.masked_mean_pool(hidden_states[:rows], mine))
        means = torch.cat(found)[packing.order]
        ctx.save_for_backward(mask, packing.sentence)
        ctx.dtype = hidden_states.dtype
        return means

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        mask, sentence = ctx.saved_tensors
        count = grad.shape[0]
        owner = torch.where(mask, sentence, count)
        tokens = torch.zeros(count + 1, dtype=grad.dtype, device=grad.device)
        tokens.index_add_(0, owner.flatten(), torch.ones_like(owner, dtype=grad.dtype).flatten())
        shares = torch.cat([grad / tokens[:count, None].clamp(min=1), grad.new_zeros(1, grad.shape[1])])
        return shares.to(ctx.dtype)[owner], None, None
