"""Sentence representations at block boundaries, by a forward that stops at the last one asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shifcon_fast import ops
from shifcon_fast.modeling.architectures import Decoder, locate_decoder
from shifcon_fast.modeling.attachment import ATTACHMENT, Attachment, unshifted
from shifcon_fast.modeling.block_shift import SHIFT_TABLE, is_mapped, mapped, shift_table
from shifcon_fast.modeling.content import ordinary_norms, ordinary_tokens, token_norms
from shifcon_fast.modeling.packing import Packing, packing_of, to_device
from shifcon_fast.modeling.prefix import Beside, run_prefix


def boundary_representations(  # noqa: PLR0917 - a model's inputs, in the order in which models take them
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pool_mask: Tensor,
    boundaries: Sequence[int],
    language_ids: Tensor | None = None,
    *,
    keep_massive: bool = False,
) -> Tensor:
    """Sentence representations r(s, k) at some boundaries: means over the content tokens, in float32.

    Runs the embedding and blocks 0 … max(boundaries)-1: no later block, no final norm, no LM head. What is kept of
    each boundary is its (B, d) means, never the (B, T, d) hidden states. Sentences that would be padded share rows
    where the decoder can keep them apart (see :mod:`.packing`). Differentiable, under gradient checkpointing too.
    With ``language_ids`` the forward is shifted, and boundaries f and b count as after the shift
    that is applied at them (Hugging Face's ``hidden_states[k]`` is before it).

    Args:
        model: any model of a known architecture; attached if language_ids are given.
        input_ids, attention_mask: (B, T), as for the model. None attends everywhere. What is on the CPU is moved to
            the model's device; a mask that is there already is not read, and its rows stay padded.
        pool_mask: (B, T), which tokens to average; see :func:`~shifcon_fast.modeling.content.content_mask`. A row
            without any gives zeros.
        boundaries: which, in any order, each in 0 … L-1.
        language_ids: (B,) integers, see :class:`.ShiftHandle`; None for an unshifted pass.
        keep_massive: average tokens of massive norm too, as the official recipe does.

    Returns:
        (len(boundaries), B, d) float32, in the order of ``boundaries``.

    Raises:
        ValueError: no boundary, or one out of range; language_ids for a model that is not attached.
    """
    sentences = _Sentences(
        model, input_ids, attention_mask, pool_mask, language_ids, keep_massive=keep_massive
    )
    return sentences.representations(boundaries)


def representations_and_unshifted(  # noqa: PLR0917 - as above
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pool_mask: Tensor,
    boundaries: Sequence[int],
    unshifted_at: Sequence[int],
    language_ids: Tensor | None = None,
    *,
    keep_massive: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`boundary_representations`, and those of an unshifted pass without gradients at ``unshifted_at``.

    Both are one pass up to where the first shift is added. From there on, and where the first one ends before the
    last of ``unshifted_at``, blocks run for the unshifted one alone. A model in training mode drops out in both.

    Returns:
        (len(boundaries), B, d) and (len(unshifted_at), B, d) float32.
    """
    sentences = _Sentences(
        model, input_ids, attention_mask, pool_mask, language_ids, keep_massive=keep_massive
    )
    return sentences.with_unshifted(boundaries, unshifted_at)


class _Sentences:
    """A batch on the model's device, packed where that is right, and the ways to pass it through the blocks."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pool_mask: Tensor,
        language_ids: Tensor | None,
        *,
        keep_massive: bool,
    ) -> None:
        self.decoder = locate_decoder(model)
        self.attachment: Attachment | None = getattr(self.decoder.module, ATTACHMENT, None)
        self.keep_massive = keep_massive
        if language_ids is not None:
            if self.attachment is None:
                raise ValueError(
                    "language_ids: the model is not attached; call attach(model, space, ...) first."
                )
            if language_ids.dim() != 1:
                raise ValueError(
                    f"language_ids: got shape {tuple(language_ids.shape)}, wanted one id per sentence, (batch,)."
                )
        device = _input_device(self.decoder)
        packing = packing_of(attention_mask, self.decoder)
        self.input_ids = to_device(input_ids, device)
        self.pool_mask = to_device(pool_mask, device) != 0
        self.ids = None
        if self.attachment is not None and language_ids is not None:
            self.ids = self.attachment.prepare(language_ids, self.input_ids)
            language_ids = to_device(language_ids, device)
        self.attention_mask = None if attention_mask is None else to_device(attention_mask, device)
        self.packing = None if packing is None else packing.to(device)
        self.arguments: dict[str, Any] = {}
        if self.packing is not None:
            self.arguments["position_ids"] = self.packing.given(self.packing.position_ids)
            self.input_ids, self.attention_mask = self.packing.given(self.packing.pack(self.input_ids)), None
            if language_ids is not None:
                language_ids = self.packing.given(self.packing.of_sentences(language_ids, -1))
        if language_ids is not None:
            self.arguments["language_ids"] = language_ids

    def representations(self, boundaries: Sequence[int]) -> Tensor:
        """(len(boundaries), B, d)."""
        wanted = _check_boundaries(boundaries, self.decoder.num_boundaries)
        means = _Means(self, shifted=True)
        self._run(wanted, means)
        return means.of(wanted)

    def with_unshifted(self, boundaries: Sequence[int], unshifted_at: Sequence[int]) -> tuple[Tensor, Tensor]:
        """:meth:`representations`, and those of an unshifted pass."""
        wanted = _check_boundaries(boundaries, self.decoder.num_boundaries)
        beside_at = _check_boundaries(unshifted_at, self.decoder.num_boundaries)
        means, unshifted_means = _Means(self, shifted=True), _Means(self, shifted=False)
        departs = max(wanted)
        if self.ids is not None:
            departs = min(
                [
                    departs,
                    *(k for k, block in enumerate(self.decoder.blocks) if SHIFT_TABLE in block._buffers),
                ]
            )

        def visit(boundary: int, hidden_states: Tensor) -> None:
            if boundary in wanted:
                means(boundary, hidden_states)
            if boundary in beside_at and boundary <= departs:
                with torch.no_grad():
                    unshifted_means(boundary, hidden_states)

        beside = Beside(departs, max(beside_at), frozenset(beside_at), unshifted_means)
        self._run([*wanted, *(k for k in beside_at if k <= departs)], visit, beside)
        return means.of(wanted), unshifted_means.of(beside_at)

    def _run(
        self, wanted: Sequence[int], visit: Callable[[int, Tensor], None], beside: Beside | None = None
    ) -> None:
        with nullcontext() if self.ids is not None else unshifted(self.decoder.module):
            run_prefix(
                self.decoder, self.input_ids, self.attention_mask, wanted, visit, beside, **self.arguments
            )


class _Means:
    """Pools what it is called with, at each boundary, and keeps the means."""

    def __init__(self, sentences: _Sentences, *, shifted: bool) -> None:
        self._sentences = sentences
        self._ids = sentences.ids if shifted else None
        self._found: dict[int, Tensor] = {}

    def __call__(self, boundary: int, hidden_states: Tensor) -> None:
        batch, here = self._sentences, hidden_states.device
        mask = batch.pool_mask.to(here)
        if batch.packing is None:
            if not batch.keep_massive:
                mask, *_ = ordinary_tokens(hidden_states, mask)
            mean = ops.masked_mean_pool(hidden_states, mask)
        else:
            packing = batch.packing.to(here)
            mean, mask = _pool_packed(hidden_states, mask, packing, keep_massive=batch.keep_massive)
        block = batch.decoder.blocks[boundary]
        table = shift_table(block)
        if self._ids is not None and table is not None and is_mapped(block):
            # A map is affine: the mean of what it gives is what it gives of the mean.
            rows = torch.where(mask.any(dim=1).to(mean.device), self._ids.to(mean.device), -1)
            mean = mapped(block, mean[:, None], rows)[:, 0]
        elif self._ids is not None and table is not None:
            mean = mean + _mean_shift(table.to(mean.device), self._ids.to(mean.device), mask)
        self._found[boundary] = mean

    def of(self, boundaries: Sequence[int]) -> Tensor:
        """(len(boundaries), B, d), on the device of the last one."""
        device = self._found[max(boundaries)].device
        return torch.stack([self._found[boundary].to(device) for boundary in boundaries])


def _pool_packed(
    hidden_states: Tensor, mask: Tensor, packing: Packing, *, keep_massive: bool
) -> tuple[Tensor, Tensor]:
    """Means of sentences that share rows, and the (B, T) mask of what they are the means of."""
    rows = packing.rows(hidden_states)
    if not keep_massive:
        mask, _ = ordinary_norms(packing.unpack(token_norms(rows)), mask)
    placed = packing.pack(mask) & (packing.sentence < len(mask))
    return packing.means(rows, placed), mask


def _input_device(decoder: Decoder) -> torch.device:
    embedding: Tensor = next(decoder.module.get_input_embeddings().parameters())  # type: ignore[operator]
    return embedding.device


def visit_boundaries(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    boundaries: Sequence[int],
    visit: Callable[[int, Tensor], None],
) -> None:
    """Call ``visit(boundary, hidden_states)`` at some boundaries of an unshifted pass that stops at the last one.

    For reductions other than a mean; :func:`boundary_representations` says what runs. Each boundary's (B, T, d)
    hidden states are freed when the visit returns, unless it keeps them or gradients are on.

    Args:
        model, input_ids, attention_mask, boundaries: as for :func:`boundary_representations`.
        visit: called once per distinct boundary, from the first to the last.

    Raises:
        ValueError: no boundary, or one out of range.
    """
    decoder = locate_decoder(model)
    wanted = _check_boundaries(boundaries, decoder.num_boundaries)
    with unshifted(decoder.module):
        run_prefix(decoder, input_ids, attention_mask, wanted, visit)


def _check_boundaries(boundaries: Sequence[int], count: int) -> list[int]:
    wanted = [int(boundary) for boundary in boundaries]
    if not wanted:
        raise ValueError("boundaries: got none, wanted at least one.")
    for boundary in wanted:
        if not 0 <= boundary < count:
            raise ValueError(
                f"boundaries: got {boundary}, wanted 0 … {count - 1} (the model has {count} blocks)."
            )
    return wanted


def _mean_shift(table: Tensor, ids: Tensor, pool_mask: Tensor) -> Tensor:
    """What the shift adds to the pooled means: (B, d) float32, zero for rows left alone and rows without tokens."""
    shifted = (ids >= 0) & (pool_mask != 0).any(dim=-1)
    return table[ids.clamp(min=0)] * shifted.unsqueeze(-1)
