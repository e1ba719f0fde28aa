"""How one block's input is shifted: the buffers that hold the shift, and what is done with them.

The mean shift is a row of a table, which rides along with the block's first norm. Interventions that are maps
(``space.intervention``) move the input before the block sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shifcon_fast import ops
from shifcon_fast.space.intervention import MapTables, ProjectionTables

SHIFT_TABLE = "_shifcon_shift"
"""Name of the non-persistent buffer, (K, d) float32, on a block whose boundary is shifted."""

_PREFIX = "_shifcon_map_"
_MAP = ("source", "left", "right")
_PROJECTION = ("mean", "basis")
_HOW = "_shifcon_projection"
BUFFERS = (SHIFT_TABLE, *(f"{_PREFIX}{name}" for name in (*_MAP, *_PROJECTION)))
"""All buffers that a shift may put on a block."""

Map = MapTables | ProjectionTables


@dataclass(frozen=True)
class Projection:
    """What of :class:`.ProjectionTables` is no tensor."""

    pivot: int
    toward: bool
    alpha: float


def put_shift(block: nn.Module, table: Tensor, map_: Map | None) -> None:
    """Register what a block does to its input, as buffers, which move with it.

    Tensors of the same shapes as before are copied in place: what was compiled stays valid.
    """
    tensors = {SHIFT_TABLE: table}
    if isinstance(map_, MapTables):
        tensors |= {_PREFIX + name: getattr(map_, name) for name in _MAP}
    elif map_ is not None:
        tensors |= {_PREFIX + name: getattr(map_, name) for name in _PROJECTION}
        block.__dict__[_HOW] = Projection(map_.pivot, map_.toward, map_.alpha)
    for name, tensor in tensors.items():
        before = block._buffers.get(name)
        if before is not None and before.shape == tensor.shape:
            with torch.no_grad():
                before.copy_(tensor)
        else:
            block.register_buffer(name, tensor.to(_device_of(block)), persistent=False)


def remove_shift(block: nn.Module) -> None:
    """Undo :func:`put_shift`."""
    block.__dict__.pop(_HOW, None)
    for name in BUFFERS:
        block._buffers.pop(name, None)
        block._non_persistent_buffers_set.discard(name)


def is_mapped(block: nn.Module) -> bool:
    """Whether the block's input is moved by a map, not by a constant for each language."""
    return any(name in block._buffers for name in BUFFERS[1:])


def keep_float32(block: nn.Module, apply: Callable[[], object]) -> None:
    """Run a block's ``_apply``; the shift stays float32 where that converts the weights to another dtype."""
    before = {name: block._buffers[name] for name in BUFFERS if name in block._buffers}
    apply()
    for name, tensor in before.items():
        moved = block._buffers.get(name)
        if tensor is not None and moved is not None and moved.dtype != torch.float32:
            # .half() and .to(bfloat16) mean the weights; the vectors stay as they were estimated.
            block._buffers[name] = tensor.to(moved.device)


def mapped(block: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """The map of a block, of rows of languages; computed in float32 and rounded once to the dtype of x.

    Args:
        x: (B, T, d).
        ids: (B,) or (B, T) int64; rows or tokens of -1 come back bit for bit.

    Returns:
        (B, T, d), differentiable in x.
    """
    buffers = {
        name: tensor.to(x.device) for name in BUFFERS if (tensor := block._buffers.get(name)) is not None
    }
    if _PREFIX + "basis" in buffers:
        how: Projection = block.__dict__[_HOW]
        return _projected(x, ids, buffers[_PREFIX + "mean"], buffers[_PREFIX + "basis"], how)
    tables = MapTables(buffers[SHIFT_TABLE], *(buffers[_PREFIX + name] for name in _MAP))
    if ids.dim() == 1:
        moved = _moved(x, ids, tables)
    else:  # tokens of several languages in a row: each language's map of all of them, and its tokens of that
        moved = x
        for language in range(len(tables.offset)):
            found = _moved(x, torch.full_like(ids[:, 0], language), tables)
            moved = torch.where((ids == language)[..., None], found, moved)
    return torch.where((ids if ids.dim() == 2 else ids[:, None])[..., None] >= 0, moved, x)


def _moved(x: Tensor, ids: Tensor, tables: MapTables) -> Tensor:
    rows = ids.clamp(min=0)
    h = x.float()
    coordinates = (h - tables.source[rows, None]) @ tables.right[rows]
    return (h + tables.offset[rows, None] + coordinates @ tables.left[rows].mT).to(x.dtype)


def _projected(x: Tensor, ids: Tensor, mean: Tensor, basis: Tensor, how: Projection) -> Tensor:
    pivot = torch.where(ids < 0, -1, how.pivot)
    source, target = (ids, pivot) if how.toward else (pivot, ids)
    projected = ops.subspace_project(x, mean, basis, source, target)
    if how.alpha == 1:
        return projected
    partly = torch.lerp(x.float(), projected.float(), how.alpha).to(x.dtype)
    return torch.where((ids if ids.dim() == 2 else ids[:, None])[..., None] >= 0, partly, x)


def _device_of(block: nn.Module) -> torch.device:
    """Where a block computes; weights that accelerate offloads are on ``meta`` between calls."""
    device = next(block.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
