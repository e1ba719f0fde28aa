"""Multilingual contrastive learning (MCL): translations should be nearest neighbours inside the layer area.

At boundary k, with a the unit representations of N pivot sentences, t those of their translations in pivot space
and τ the temperature,

    L(k) = ½ [CE(a tᵀ / τ, diag) + CE(t aᵀ / τ, diag)],   L_mcl = mean of L(k) over k = f … b-1

(Zhang et al., ACL 2025, arXiv 2410.19453). Two ways to get into pivot space: ``shifted``, where the forward pass
itself was shifted at f; ``pooled``, the authors' code, where t ← t - mean(t) + mean(a) over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor, nn

from shifcon_fast import ops
from shifcon_fast.modeling.attach import ShiftHandle
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.objective.recipe import MclMode


class ContrastiveBatch(TypedDict):
    """N pivot sentences in rows 0 … N-1 and their translations, in any languages, in rows N … 2N-1.

    input_ids and attention_mask are (2N, T); pool_mask (2N, T) says which tokens a sentence is the mean of;
    language_ids (2N,) are ``handle.language_ids``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pool_mask: Tensor
    language_ids: Tensor


def mcl_from_representations(
    pivot: Tensor, other: Tensor, *, mode: MclMode = "shifted", temperature: float = 0.05
) -> Tensor:
    """L_mcl from sentence representations at L boundaries, in one ``info_nce`` call.

    Args:
        pivot: (L, N, d), pivot sentences.
        other: (L, N, d), their translations: from a shifted pass for "shifted", from an unshifted one for "pooled".
        mode: "shifted" or "pooled".
        temperature: τ > 0.

    Returns:
        () float32, differentiable in both.

    Raises:
        ValueError: unknown mode, a temperature that is not positive, shapes that do not fit.
    """
    _check(mode, temperature)
    return ops.info_nce(pivot, other, scale=1 / temperature, recenter=mode == "pooled").mean()


def mcl_loss(
    model: nn.Module,
    batch: ContrastiveBatch,
    handle: ShiftHandle,
    *,
    mode: MclMode = "shifted",
    temperature: float = 0.05,
) -> Tensor:
    """L_mcl of a batch of translation pairs, for the area [f, b) of an attached model.

    One pass for both languages, through blocks 0 … b-2 only: no later block, no LM head.

    Args:
        model: the attached model, or what wraps it.
        batch: see :class:`ContrastiveBatch`; it is moved to the model's device.
        handle: what ``attach`` returned.
        mode, temperature: as for :func:`mcl_from_representations`.

    Returns:
        () float32 with a graph to the model's parameters.

    Raises:
        ValueError: unknown mode, a temperature that is not positive, an odd number of rows.
    """
    _check(mode, temperature)
    boundaries = range(handle.forward, handle.backward)
    pivot, other = contrastive_representations(
        model, batch, boundaries, shifted=mode == "shifted", keep_massive=handle.recipe == "official"
    )
    return mcl_from_representations(pivot, other, mode=mode, temperature=temperature)


def contrastive_representations(
    model: nn.Module,
    batch: ContrastiveBatch,
    boundaries: Sequence[int],
    *,
    shifted: bool,
    keep_massive: bool = False,
) -> tuple[Tensor, Tensor]:
    """Representations of a batch's pivot sentences and of their translations, each (len(boundaries), N, d) float32.

    ``keep_massive``: see :func:`boundary_representations`.

    Raises:
        ValueError: an odd number of rows.
    """
    rows = batch["input_ids"].shape[0]
    if rows == 0 or rows % 2:
        raise ValueError(f"batch: got {rows} rows; wanted N pivot sentences and their N translations")
    device = next(model.parameters()).device
    representations = boundary_representations(
        model,
        batch["input_ids"].to(device),
        batch["attention_mask"].to(device),
        batch["pool_mask"].to(device),
        boundaries,
        batch["language_ids"].to(device) if shifted else None,
        keep_massive=keep_massive,
    )
    return representations[:, : rows // 2], representations[:, rows // 2 :]


def _check(mode: str, temperature: float) -> None:
    if mode not in ("shifted", "pooled"):
        raise ValueError(f'mode: got {mode!r}; wanted "shifted" or "pooled"')
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}; wanted a positive number")
