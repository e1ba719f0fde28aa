"""Block forwards, one per layout: the block's own computation with each RMSNorm in ``ops.add_shift_rms_norm``.

With r the residual stream, N a norm, A attention, M the MLP, and the shift s (zero but at the area's two boundaries):

    pre_norm     r ← r + s;  r ← r + A(N1 r);         r ← r + M(N2 r)
    sandwich     r ← r + s;  r ← r + N2 A(N1 r);      r ← r + N4 M(N3 r)
    post_norm    r ← r + s;  r ← r + N1 A(r);         r ← r + N2 M(r)
    shift_only   r ← r + s;  the block's own forward

The shift and the first residual add ride along with the norm that reads their sum. Unshifted, every layout performs
the operations of transformers' forward in the same order; the fused add sums in float32 and rounds once, which is
what a bfloat16 or float16 addition does too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shifcon_fast.modeling.architectures import Architecture, Layout
from shifcon_fast.modeling.norms import NormCounts, add_norm, add_shift

SHIFT_TABLE = "_shifcon_shift"
"""Name of the non-persistent buffer, (K, d) float32, on a block whose boundary is shifted."""

NORM_COUNTS = "_shifcon_counts"
"""Name of the attribute that holds a block's :class:`NormCounts`."""

BlockForward = Callable[..., Any]


def block_forward(original: type[nn.Module], architecture: Architecture) -> BlockForward:
    """The ``forward`` that replaces ``original.forward``; it takes ``language_ids`` (B,) in addition."""
    run = _LAYOUTS[architecture.layout]
    names = list(inspect.signature(original.forward).parameters)[2:]

    @functools.wraps(original.forward)
    def forward(
        self: nn.Module, hidden_states: Tensor, *args: Any, language_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        shift = self._buffers.get(SHIFT_TABLE) if language_ids is not None else None
        index = None
        if shift is not None and language_ids is not None:
            shift = shift.to(hidden_states.device)
            index = language_ids.to(hidden_states.device)
        if architecture.layout == "shift_only":
            if shift is not None and index is not None:
                hidden_states = add_shift(hidden_states, shift, index)
            return original.forward(self, hidden_states, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        return run(self, architecture, hidden_states, shift, index, kwargs)

    return forward


def _pre_norm(
    block: Any,
    row: Architecture,
    x: Tensor,
    shift: Tensor | None,
    index: Tensor | None,
    attention: dict[str, Any],
) -> Tensor:
    counts: NormCounts = getattr(block, NORM_COUNTS)
    y, h = add_norm(block, "input_layernorm", row, counts, x, shift=shift, index=index)
    branch, _ = block.self_attn(hidden_states=y, **attention)
    y, h = add_norm(block, "post_attention_layernorm", row, counts, _scale(block, row, branch, 0), residual=h)
    return h + _scale(block, row, block.mlp(y), 1)


def _scale(block: Any, row: Architecture, branch: Tensor, half: int) -> Tensor:
    """What some architectures do to a branch before it is added to the residual stream."""
    if row.dropouts is not None:
        branch = getattr(block, row.dropouts[half])(branch)
    if row.residual_multiplier is not None:
        branch = branch * getattr(block, row.residual_multiplier)
    return branch


def _sandwich(
    block: Any,
    row: Architecture,
    x: Tensor,
    shift: Tensor | None,
    index: Tensor | None,
    attention: dict[str, Any],
) -> Tensor:
    counts: NormCounts = getattr(block, NORM_COUNTS)
    y, h = add_norm(block, "input_layernorm", row, counts, x, shift=shift, index=index)
    branch, _ = block.self_attn(hidden_states=y, **attention)
    branch, _ = add_norm(block, "post_attention_layernorm", row, counts, branch)
    y, h = add_norm(block, "pre_feedforward_layernorm", row, counts, branch, residual=h)
    branch, _ = add_norm(block, "post_feedforward_layernorm", row, counts, block.mlp(y))
    return h + branch


def _post_norm(
    block: Any,
    row: Architecture,
    x: Tensor,
    shift: Tensor | None,
    index: Tensor | None,
    attention: dict[str, Any],
) -> Tensor:
    counts: NormCounts = getattr(block, NORM_COUNTS)
    h = x if shift is None or index is None else add_shift(x, shift, index)
    branch, _ = block.self_attn(hidden_states=h, **attention)
    branch, _ = add_norm(block, "post_attention_layernorm", row, counts, branch)
    h = h + branch
    branch, _ = add_norm(block, "post_feedforward_layernorm", row, counts, block.mlp(h))
    return h + branch


_LAYOUTS: dict[Layout, Callable[..., Tensor]] = {
    "pre_norm": _pre_norm,
    "sandwich": _sandwich,
    "post_norm": _post_norm,
}
