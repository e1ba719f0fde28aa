"""Sentence representations at block boundaries, by a forward that stops at the last one asked for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from shifcon_fast import ops
from shifcon_fast.modeling.architectures import Decoder, locate_decoder
from shifcon_fast.modeling.attachment import ATTACHMENT, Attachment, unshifted
from shifcon_fast.modeling.block_shift import SHIFT_TABLE, is_mapped, mapped
from shifcon_fast.modeling.content import ordinary_norms, ordinary_tokens, token_norms
from shifcon_fast.modeling.packing import Packing, packing_of, to_device


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
    decoder = locate_decoder(model)
    wanted = _check_boundaries(boundaries, decoder.num_boundaries)
    attachment: Attachment | None = getattr(decoder.module, ATTACHMENT, None)
    if language_ids is not None:
        if attachment is None:
            raise ValueError("language_ids: the model is not attached; call attach(model, space, ...) first.")
        if language_ids.dim() != 1:
            raise ValueError(
                f"language_ids: got shape {tuple(language_ids.shape)}, wanted one id per sentence, (batch,)."
            )
    device = _input_device(decoder)
    packing = packing_of(attention_mask, decoder)
    input_ids, pool_mask = to_device(input_ids, device), to_device(pool_mask, device) != 0
    ids = None
    if attachment is not None and language_ids is not None:
        ids = attachment.prepare(language_ids, input_ids)
        language_ids = to_device(language_ids, device)
    arguments: dict[str, Any] = {}
    if packing is not None:
        packing = packing.to(device)
        arguments["position_ids"] = packing.given(packing.position_ids)
        input_ids, attention_mask = packing.given(packing.pack(input_ids)), None
        if language_ids is not None:
            arguments["language_ids"] = packing.given(packing.of_sentences(language_ids, -1))
    else:
        attention_mask = None if attention_mask is None else to_device(attention_mask, device)
        if language_ids is not None:
            arguments["language_ids"] = language_ids
    pooled: dict[int, Tensor] = {}

    def pool(boundary: int, hidden_states: Tensor) -> None:
        here = hidden_states.device
        mask = pool_mask.to(here)
        if packing is None:
            if not keep_massive:
                mask, *_ = ordinary_tokens(hidden_states, mask)
            mean = ops.masked_mean_pool(hidden_states, mask)
        else:
            mean, mask = _pool_packed(hidden_states, mask, packing.to(here), keep_massive=keep_massive)
        table = decoder.blocks[boundary]._buffers.get(SHIFT_TABLE)
        if ids is not None and table is not None and is_mapped(decoder.blocks[boundary]):
            # A map is affine: the mean of what it gives is what it gives of the mean.
            rows = torch.where(mask.any(dim=1).to(mean.device), ids.to(mean.device), -1)
            mean = mapped(decoder.blocks[boundary], mean[:, None], rows)[:, 0]
        elif ids is not None and table is not None:
            mean = mean + _mean_shift(table.to(mean.device), ids.to(mean.device), mask)
        pooled[boundary] = mean

    with nullcontext() if ids is not None else unshifted(decoder.module):
        _run_prefix(decoder, input_ids, attention_mask, wanted, pool, **arguments)
    last = pooled[max(wanted)].device
    return torch.stack([pooled[boundary].to(last) for boundary in wanted])


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
        _run_prefix(decoder, input_ids, attention_mask, wanted, visit)


def _run_prefix(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    wanted: Sequence[int],
    visit: Callable[[int, Tensor], None],
    **arguments: Any,
) -> None:
    last, after_blocks = max(wanted), decoder.architecture.after_blocks
    known = after_blocks is not None
    # Where it is not known what follows the blocks, what leaves the last one of them is looked at.
    prefix = _prefix(decoder, last if known else max(last, 1), frozenset(wanted), visit)
    for name in after_blocks or ():
        if prefix._modules.get(name) is not None:
            prefix._modules[name] = nn.Identity()
    output = prefix(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **arguments
    )
    if known:
        visit(last, output.last_hidden_state)


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


class _PooledBlock(nn.Module):
    """Stands around a block and looks at its input, or at its output.

    Outside of the block's gradient checkpointing, which wraps the block's forward: they are seen once, not again
    when the block is recomputed.
    """

    def __init__(
        self,
        block: nn.Module,
        look: Callable[[Tensor], None] | None,
        look_after: Callable[[Tensor], None] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.block = block
        self.look = look
        self.look_after = look_after

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _loses_gradients(self.block, hidden_states):
            hidden_states = hidden_states.detach().requires_grad_()
        if self.look is not None:
            self.look(hidden_states)
        output = self.block(hidden_states, *args, **kwargs)
        if self.look_after is not None:
            self.look_after(output[0] if isinstance(output, tuple) else output)
        return output

    def __getattr__(self, name: str) -> Any:
        # Some decoders read facts off their blocks, such as the kind of attention.
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "block"), name)

    @property
    def __class__(self) -> Any:
        # Others (Jamba's of transformers 5.0) ask what kind of block it is.
        return type(self.block)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("the class of a view of a block cannot be changed")


def _loses_gradients(block: nn.Module, hidden_states: Tensor) -> bool:
    """Whether reentrant checkpointing would cut the graph: it tracks nothing unless an input requires grad."""
    if hidden_states.requires_grad or not (torch.is_grad_enabled() and block.training):
        return False
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
    return bool(getattr(block, "gradient_checkpointing", False) and reentrant)


def _prefix(
    decoder: Decoder, length: int, wanted: frozenset[int], visit: Callable[[int, Tensor], None]
) -> nn.Module:
    """A view of the decoder that has only its first blocks; it shares every weight with it."""
    prefix = copy.copy(decoder.module)
    prefix.__dict__["_modules"] = dict(decoder.module._modules)
    blocks = [
        _PooledBlock(block, functools.partial(visit, index) if index in wanted else None)
        for index, block in enumerate(list(decoder.blocks)[:length])
    ]
    if decoder.architecture.after_blocks is None and length in wanted:
        blocks[-1].look_after = functools.partial(visit, length)
    prefix._modules[decoder.architecture.blocks] = nn.ModuleList(blocks)
    # accelerate's device hooks live in the instance and are bound to the whole decoder; bind them to the view.
    for key in prefix.__dict__.keys() & {"forward", "_old_forward"}:
        kept = prefix.__dict__[key]
        hooked = isinstance(kept, functools.partial)
        prefix.__dict__[key] = (
            functools.partial(kept.func, prefix) if hooked else MethodType(kept.__func__, prefix)
        )
    return prefix
