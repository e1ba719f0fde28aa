"""Block forwards, one per layout: the block's own computation with each RMSNorm in ``ops.add_shift_rms_norm``.

With r the residual stream, N a norm, A attention, M the MLP, and s the shift (there only at the area's boundaries):

    pre_norm     r ← r + s;  r ← r + A(N1 r);         r ← r + M(N2 r)
    sandwich     r ← r + s;  r ← r + N2 A(N1 r);      r ← r + N4 M(N3 r)
    post_norm    r ← r + s;  r ← r + N1 A(r);         r ← r + N2 M(r)
    shift_only   r ← r + s;  the block's own forward

A and M are the row's ``mixer`` and ``feed_forward``: another mixer, or experts, may stand in their places.
A map (``block_shift``) takes the place of r + s.
The shift and the first residual add ride along with the norm that reads their sum. Unshifted, every layout performs
the operations of transformers' forward in the same order; the fused add sums in float32 and rounds once, which is
what a bfloat16 or float16 addition does too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shifcon_fast.modeling.architectures import Architecture, Layout
from shifcon_fast.modeling.attachment import ATTACHMENT
from shifcon_fast.modeling.block_shift import SHIFT_TABLE, is_mapped, mapped, shift_table
from shifcon_fast.modeling.branches import Arguments, Norm
from shifcon_fast.modeling.norms import NORM_COUNTS, Shift, add_norm, add_shift

BlockForward = Callable[..., Any]
LayoutOutput = tuple[Tensor, Tensor | None]  # hidden states, attention weights where asked for


def block_forward(original: Any, architecture: Architecture) -> BlockForward:
    """The ``forward`` that replaces ``original.forward``; it takes ``language_ids`` (B,) or (B, T) too."""
    names = list(inspect.signature(original.forward).parameters)[2:]
    returns_tuple = "output_attentions" in names  # blocks of transformers 5.0's older style (Granite)

    @functools.wraps(original.forward)
    def forward(
        self: nn.Module, hidden_states: Tensor, *args: Any, language_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        hidden_states, shift = _shift(self, hidden_states, language_ids)
        if architecture.layout == "shift_only":
            hidden_states = hidden_states if shift is None else add_shift(hidden_states, shift)
            return original.forward(self, hidden_states, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        out, weights = _LAYOUTS[architecture.layout](self, architecture, hidden_states, shift, kwargs)
        if architecture.finish is not None:
            out = architecture.finish(self, out, kwargs, _norm_of(self, architecture))
        if not returns_tuple:
            return out
        return (out, weights) if kwargs.get("output_attentions") else (out,)

    return forward


def _shift(
    block: nn.Module, hidden_states: Tensor, language_ids: Tensor | None
) -> tuple[Tensor, Shift | None]:
    """A block's input, moved where the intervention is a map; and what is to be added to it, if anything is."""
    if language_ids is None or SHIFT_TABLE not in block._buffers:
        return hidden_states, None
    if hidden_states.dim() != 3 or hidden_states.shape[: language_ids.dim()] != language_ids.shape:
        raise ValueError(
            f"model: the input of a {type(block).__name__} has shape {tuple(hidden_states.shape)}, which "
            f"language_ids of shape {tuple(language_ids.shape)} do not fit: wanted (batch, tokens, hidden size)."
        )
    counts, routing = block.__dict__[NORM_COUNTS], block.__dict__[ATTACHMENT].call.routing
    if routing is not None and routing.block == counts.block:
        routing.decide(hidden_states)
    if not torch.compiler.is_compiling():
        counts.engaged["shift"] += 1
    language_ids = language_ids.to(hidden_states.device)
    if is_mapped(block):
        return mapped(block, hidden_states, language_ids), None
    table = shift_table(block)
    assert table is not None
    return hidden_states, Shift(table.to(hidden_states.device), language_ids)


def _norm_of(block: nn.Module, architecture: Architecture) -> Norm:
    return lambda site, x: add_norm(block, site, architecture, x)[0]


def _pre_norm(
    block: Any, row: Architecture, x: Tensor, shift: Shift | None, arguments: Arguments
) -> LayoutOutput:
    first, second = row.norm_names
    y, h = add_norm(block, first, row, x, shift=shift)
    branch, weights = row.mixer(block, y, arguments)
    y, h = add_norm(block, second, row, _scale(block, row, branch, 0), residual=h)
    branch = row.feed_forward(block, y, h, _norm_of(block, row))
    return h + _scale(block, row, branch, 1), weights


def _scale(block: Any, row: Architecture, branch: Tensor, half: int) -> Tensor:
    """What some architectures do to a branch before it is added to the residual stream."""
    if row.dropouts is not None:
        branch = getattr(block, row.dropouts[half])(branch)
    if row.residual_multiplier is not None:
        branch = branch * getattr(block, row.residual_multiplier)
    return branch


def _sandwich(
    block: Any, row: Architecture, x: Tensor, shift: Shift | None, arguments: Arguments
) -> LayoutOutput:
    first, second, third, fourth = row.norm_names
    y, h = add_norm(block, first, row, x, shift=shift)
    branch, weights = row.mixer(block, y, arguments)
    branch, _ = add_norm(block, second, row, branch)
    y, h = add_norm(block, third, row, branch, residual=h)
    branch, _ = add_norm(block, fourth, row, row.feed_forward(block, y, h, _norm_of(block, row)))
    return h + branch, weights


def _post_norm(
    block: Any, row: Architecture, x: Tensor, shift: Shift | None, arguments: Arguments
) -> LayoutOutput:
    first, second = row.norm_names
    h = x if shift is None else add_shift(x, shift)
    branch, weights = row.mixer(block, h, arguments)
    branch, _ = add_norm(block, first, row, branch)
    h = h + branch
    branch, _ = add_norm(block, second, row, row.feed_forward(block, h, h, _norm_of(block, row)))
    return h + branch, weights


_LAYOUTS: dict[Layout, Callable[..., LayoutOutput]] = {
    "pre_norm": _pre_norm,
    "sandwich": _sandwich,
    "post_norm": _post_norm,
}
