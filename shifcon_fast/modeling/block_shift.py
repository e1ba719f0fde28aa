"""How one block's input is shifted: the buffers that hold the shift, and what is done with them.

The mean shift is a row of a table, which rides along with the block's first norm. Interventions that are maps
(``space.intervention``) move the input before the block sees it. Either may be scaled by a parameter, a factor for
each language, that is learnt: see :func:`learn_factors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
_DOSE = _PREFIX + "alpha"
_HOW = "_shifcon_projection"
BUFFERS = (SHIFT_TABLE, *(f"{_PREFIX}{name}" for name in (*_MAP, *_PROJECTION)), _DOSE)
"""All buffers that a shift may put on a block."""
FACTORS = "_shifcon_alphas"
"""Name of the parameter, (K,) float32, that scales a block's shift of each language; only while it is learnt."""

Map = MapTables | ProjectionTables


@dataclass(frozen=True)
class Projection:
    """What of :class:`.ProjectionTables` is no tensor."""

    pivot: int
    toward: bool
    alpha: float  # 1 where a buffer holds one for each language


def put_shift(block: nn.Module, table: Tensor, map_: Map | None) -> None:
    """Register what a block does to its input, as buffers, which move with it.

    Tensors of the same shapes as before are copied in place: what was compiled stays valid.
    """
    tensors = {SHIFT_TABLE: table}
    if isinstance(map_, MapTables):
        tensors |= {_PREFIX + name: getattr(map_, name) for name in _MAP}
    elif map_ is not None:
        tensors |= {_PREFIX + name: getattr(map_, name) for name in _PROJECTION}
        alpha = map_.alpha
        if isinstance(alpha, Tensor):
            tensors[_DOSE], alpha = alpha, 1.0
        else:
            block._buffers.pop(_DOSE, None)
        block.__dict__[_HOW] = Projection(map_.pivot, map_.toward, alpha)
    for name, tensor in tensors.items():
        before = block._buffers.get(name)
        if before is not None and before.shape == tensor.shape:
            with torch.no_grad():
                before.copy_(tensor)
        else:
            block.register_buffer(name, tensor.to(_device_of(block)), persistent=False)


def learn_factors(blocks: Iterable[nn.Module], factors: nn.Parameter | None) -> None:
    """Scale what blocks do to their inputs by one parameter, a factor for each language; None ends it.

    A table is multiplied before the norm's operator takes it, whose gradient in its rows is summed in float32: that
    in the factor of a language is its product with the row.
    """
    for block in blocks:
        block._parameters.pop(FACTORS, None)
        if factors is not None:
            block.register_parameter(FACTORS, factors)


def shift_table(block: nn.Module) -> Tensor | None:
    """(K, d) float32, what a block adds to its input, by language; None for one that adds nothing."""
    table, factors = block._buffers.get(SHIFT_TABLE), block._parameters.get(FACTORS)
    if table is None or factors is None:
        return table
    return factors.to(table.device)[:, None] * table


def remove_shift(block: nn.Module) -> None:
    """Undo :func:`put_shift`."""
    block.__dict__.pop(_HOW, None)
    block._parameters.pop(FACTORS, None)
    for name in BUFFERS:
        block._buffers.pop(name, None)
        block._non_persistent_buffers_set.discard(name)


def is_mapped(block: nn.Module) -> bool:
    """Whether the block's input is moved by a map, not by a constant for each language."""
    return any(name in block._buffers for name in BUFFERS[1:])


def keep_float32(block: nn.Module, apply: Callable[[], object]) -> None:
    """Run a block's ``_apply``; the shift stays float32 where that converts the weights to another dtype."""
    before = {name: block._buffers[name] for name in BUFFERS if name in block._buffers}
    factors = block._parameters.get(FACTORS)
    learnt = None if factors is None else factors.data
    apply()
    if factors is not None and learnt is not None and factors.dtype != torch.float32:
        factors.data = learnt.to(factors.device, torch.float32)
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
        (B, T, d), differentiable in x, and in factors that are learnt.
    """
    buffers = {
        name: tensor.to(x.device) for name in BUFFERS if (tensor := block._buffers.get(name)) is not None
    }
    learnt = block._parameters.get(FACTORS)
    factors = None if learnt is None else learnt.to(x.device)
    if _PREFIX + "basis" in buffers:
        how: Projection = block.__dict__[_HOW]
        alpha = buffers.get(_DOSE, how.alpha)
        mean, basis = (buffers[_PREFIX + name] for name in _PROJECTION)
        alpha = alpha if factors is None else factors * alpha
        return _projected(x, ids, ProjectionTables(mean, basis, how.pivot, how.toward, alpha))
    tables = MapTables(buffers[SHIFT_TABLE], *(buffers[_PREFIX + name] for name in _MAP))
    if ids.dim() == 1:
        return _where_said(ids, _moved(x, ids, tables, factors), x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _moved_in_groups(x, ids, tables, factors)
    # Which tokens are of a language is not known here without waiting for the device: its map of all of them.
    moved = x
    for language in range(len(tables.offset)):
        found = _moved(x, torch.full_like(ids[:, 0], language), tables, factors)
        moved = torch.where((ids == language)[..., None], found, moved)
    return moved


def _moved_in_groups(x: Tensor, ids: Tensor, tables: MapTables, factors: Tensor | None) -> Tensor:
    """Tokens of several languages in a row, (B, T) ids: each language's map of its own tokens."""
    tokens, of = x.flatten(0, 1), ids.flatten()
    places = [(of == language).nonzero()[:, 0] for language in range(len(tables.offset))]
    found = [
        _moved(tokens[at][None], of.new_tensor([language]), tables, factors)[0]
        for language, at in enumerate(places)
    ]
    return tokens.index_copy(0, torch.cat(places), torch.cat(found)).view_as(x)


def _moved(x: Tensor, ids: Tensor, tables: MapTables, factors: Tensor | None) -> Tensor:
    rows = ids.clamp(min=0)
    h = x.float()
    coordinates = (h - tables.source[rows, None]) @ tables.right[rows]
    displacement = tables.offset[rows, None] + coordinates @ tables.left[rows].mT
    if factors is not None:
        displacement = factors[rows, None, None] * displacement
    return (h + displacement).to(x.dtype)


def _projected(x: Tensor, ids: Tensor, tables: ProjectionTables) -> Tensor:
    pivot = torch.where(ids < 0, -1, tables.pivot)
    source, target = (ids, pivot) if tables.toward else (pivot, ids)
    projected = ops.subspace_project(x, tables.mean, tables.basis, source, target)
    alpha = tables.alpha
    if isinstance(alpha, Tensor):
        alpha = alpha[ids.clamp(min=0)]
        alpha = alpha.view(*alpha.shape, *[1] * (3 - alpha.dim()))
    elif alpha == 1:
        return projected
    return _where_said(ids, torch.lerp(x.float(), projected.float(), alpha).to(x.dtype), x)


def _where_said(ids: Tensor, moved: Tensor, x: Tensor) -> Tensor:
    """``moved`` where a language is said, x where the id is -1."""
    return torch.where((ids if ids.dim() == 2 else ids[:, None])[..., None] >= 0, moved, x)


def _device_of(block: nn.Module) -> torch.device:
    """Where a block computes; weights that accelerate offloads are on ``meta`` between calls."""
    device = next(block.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
