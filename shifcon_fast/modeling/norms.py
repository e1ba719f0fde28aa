"""One RMSNorm site of a decoder block, sent through ``ops.add_shift_rms_norm`` and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from shifcon_fast import ops
from shifcon_fast.modeling.architectures import Architecture

NORM_COUNTS = "_shifcon_counts"
"""Name of the attribute that holds a block's :class:`NormCounts`."""


@dataclass(frozen=True)
class Shift:
    """What is added at the entry of a block: ``table[index]``.

    ``table`` is (K, d) float32, ``index`` (B,) or (B, T) int64; -1 adds nothing.
    """

    table: Tensor
    index: Tensor


@dataclass
class NormCounts:
    """How often each norm site of a block ran through the operator, and why one did not; how often it shifted.

    Nothing is counted while ``torch.compile`` traces: a counter there would be a guard, and recompile every step.

    Attributes:
        block: number of the block.
        engaged: norm site, or ``"shift"`` → runs.
        bypassed: norm site → why its module was called instead.
    """

    block: int
    engaged: Counter[str] = field(default_factory=Counter)
    bypassed: dict[str, str] = field(default_factory=dict)


def add_norm(
    block: nn.Module,
    site: str,
    architecture: Architecture,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    shift: Shift | None = None,
) -> tuple[Tensor, Tensor]:
    """y = RMSNorm(h) · weight and h = x + residual + shift for the norm module ``block.<site>``.

    Args:
        x, residual: (B, T, d).
        shift: added to each row of the batch, or each token, by its language.

    Returns:
        y and h, (B, T, d), in the dtype of x + residual. A norm that is not the plain module of the table is called
        as it is, so that what it computes stays right, and ``NormCounts.bypassed`` of the block says why.
    """
    module: Any = active_module(getattr(block, site))
    counts: NormCounts = block.__dict__[NORM_COUNTS]
    if residual is not None and residual.dtype != x.dtype:  # autocast: float32 stream, bfloat16 branch
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    reason = why_not_plain(module, architecture, x)
    if reason is None:
        if not torch.compiler.is_compiling():
            counts.engaged[site] += 1
        table, index = (None, None) if shift is None else (shift.table, shift.index)
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        return ops.add_shift_rms_norm(
            x, module.weight, residual, table, index, eps=eps, style=architecture.style
        )
    if not torch.compiler.is_compiling():
        counts.bypassed[site] = reason
    h = x if residual is None else x + residual
    if shift is not None:
        h = add_shift(h, shift)
    return module(h), h


def add_shift(x: Tensor, shift: Shift) -> Tensor:
    """x + shift for blocks without a norm at their entry: summed in float32, rounded once to x.dtype.

    Args:
        x: (B, T, d). Rows of the batch (or tokens) whose index is -1 come back bit for bit.
    """
    index = shift.index if shift.index.dim() == 2 else shift.index[:, None]
    shifted = (x.float() + shift.table[index.clamp(min=0)]).to(x.dtype)
    return torch.where((index >= 0)[..., None], shifted, x)


def active_module(module: nn.Module) -> nn.Module:
    """The module that runs: PEFT's ``modules_to_save`` keeps the trained copy of a norm beside the original."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = [] if module.disable_adapters else list(module.active_adapters)  # type: ignore[arg-type]
    if not active:
        return module.original_module  # type: ignore[return-value]
    return copies[active[0]] if len(active) == 1 and active[0] in copies else module


def why_not_plain(module: nn.Module, architecture: Architecture, x: Tensor) -> str | None:
    """Why the operator cannot stand in for a norm module; None when it can.

    Whatever somebody hung on the module (a replaced forward, forward hooks, weights that accelerate loads when the
    module is called) would be skipped with the call, so such a module is called.
    """
    if type(module).__name__ != architecture.norm:
        return f"it is a {type(module).__name__}, not a {architecture.norm}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    forward = module.__dict__.get("forward")
    if forward is not None and not _is_own(forward, module) and not _only_moves_devices(module):
        by = getattr(forward, "__func__", forward)
        return f"its forward was replaced on the instance by {getattr(by, '__qualname__', repr(by))}"
    if module.weight.device != x.device:
        return f"its weight is on {module.weight.device}, the hidden states on {x.device}"
    return None


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a forward on the instance is the class's own, as ``kernels`` leaves it where it has no kernel."""
    return isinstance(forward, MethodType) and forward.__func__ is type(module).forward


def _only_moves_devices(module: nn.Module) -> bool:
    """Whether the instance's forward is accelerate's hook of a ``device_map`` without offloading.

    Such a hook moves inputs to the weights' device, where the block's own hook has already put them.
    """
    hook = module.__dict__.get("_hf_hook")
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload  # type: ignore[union-attr]
