"""Block forwards, one per layout: the block's own computation with each RMSNorm in ``ops.add_shift_rms_norm``.

With r the residual stream, N a norm, A attention, M the MLP, and s the shift (there only at the area's boundaries):

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
from shifcon_fast.modeling.norms import Shift, add_norm, add_shift

SHIFT_TABLE = "_shifcon_shift"
"""Name of the non-persistent buffer, (K, d) float32, on a block whose boundary is shifted."""

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
        table = self._buffers.get(SHIFT_TABLE)
        shift = None
        if table is not None and language_ids is not None:
            device = hidden_states.device
            shift = Shift(table.to(device), language_ids.to(device))
        if architecture.layout == "shift_only":
            hidden_states = hidden_states if shift is None else add_shift(hidden_states, shift)
            return original.forward(self, hidden_states, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        out, weights = _LAYOUTS[architecture.layout](self, architecture, hidden_states, shift, kwargs)
        if not returns_tuple:
            return out
        return (out, weights) if kwargs.get("output_attentions") else (out,)

    return forward


def _pre_norm(
    block: Any, row: Architecture, x: Tensor, shift: Shift | None, attention: dict[str, Any]
) -> LayoutOutput:
    y, h = add_norm(block, "input_layernorm", row, x, shift=shift)
    branch, weights = block.self_attn(hidden_states=y, **attention)
    y, h = add_norm(block, "post_attention_layernorm", row, _scale(block, row, branch, 0), residual=h)
    return h + _scale(block, row, block.mlp(y), 1), weights


def _scale(block: Any, row: Architecture, branch: Tensor, half: int) -> Tensor:
    """What some architectures do to a branch before it is added to the residual stream."""
    if row.dropouts is not None:
        branch = getattr(block, row.dropouts[half])(branch)
    if row.residual_multiplier is not None:
        branch = branch * getattr(block, row.residual_multiplier)
    return branch


def _sandwich(
    block: Any, row: Architecture, x: Tensor, shift: Shift | None, attention: dict[str, Any]
) -> LayoutOutput:
    y, h = add_norm(block, "input_layernorm", row, x, shift=shift)
    branch, weights = block.self_attn(hidden_states=y, **attention)
    branch, _ = add_norm(block, "post_attention_layernorm", row, branch)
    y, h = add_norm(block, "pre_feedforward_layernorm", row, branch, residual=h)
    branch, _ = add_norm(block, "post_feedforward_layernorm", row, block.mlp(y))
    return h + branch, weights


def _post_norm(
    block: Any, row: Architecture, x: Tensor, shift: Shift | None, attention: dict[str, Any]
) -> LayoutOutput:
    h = x if shift is None else add_shift(x, shift)
    branch, weights = block.self_attn(hidden_states=h, **attention)
    branch, _ = add_norm(block, "post_attention_layernorm", row, branch)
    h = h + branch
    branch, _ = add_norm(block, "post_feedforward_layernorm", row, block.mlp(h))
    return h + branch, weights


_LAYOUTS: dict[Layout, Callable[..., LayoutOutput]] = {
    "pre_norm": _pre_norm,
    "sandwich": _sandwich,
    "post_norm": _post_norm,
}
