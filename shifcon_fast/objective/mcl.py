"""Multilingual contrastive learning (MCL): translations should be nearest neighbours inside the layer area.

At boundary k, with a the unit representations of N pivot sentences, t those of their translations in pivot space
and τ the temperature,

    L(k) = ½ [CE(a tᵀ / τ, diag) + CE(t aᵀ / τ, diag)],   L_mcl = mean of L(k) over k = f … b-1

(Zhang et al., ACL 2025, arXiv 2410.19453). Two ways to get into pivot space: ``shifted``, where the forward pass
itself was shifted at f; ``pooled``, the authors' code, where t ← t - mean(t) + mean(a) over the batch. And none:
``unshifted`` contrasts the representations as they are (AFP, Li et al. 2024, arXiv 2311.08089), for comparison.

Sentences of a language have much in common: cosines of strangers are near one, the loss stays near log N, and what
it learns is to take that apart. ``standardise`` contrasts, of (N, d) rows on either side,

    a ← (a - mean(a)) / σ,  t ← (t - mean(t)) / σ,  σ² = v + 1e-6 mean(v), v of each dimension over all 2N

(dimensions weigh alike: Timkey & van Schijndel 2021, arXiv 2109.04404).

Both sides of the loss move the model. With ``anchor_pivot`` the pivot's stay where they are, as far as this loss is
concerned, and translations come to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shifcon_fast import ops
from shifcon_fast.modeling.boundaries import boundary_representations, representations_and_unshifted
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.modeling.packing import to_device
from shifcon_fast.objective.across_processes import gather_pairs, pairs_of_processes
from shifcon_fast.objective.gradient_cache import encode_in_turns, passes_needed
from shifcon_fast.objective.recipe import MclMode

_LEAST = 1e-6
"""Variance of a dimension that is reckoned with, as a share of the mean over dimensions."""


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
    pivot: Tensor,
    other: Tensor,
    *,
    mode: MclMode = "shifted",
    temperature: float = 0.05,
    anchor_pivot: bool = False,
    standardise: bool = False,
) -> Tensor:
    """L_mcl from sentence representations at L boundaries, in one ``info_nce`` call.

    Args:
        pivot: (L, N, d), pivot sentences.
        other: (L, N, d), their translations: from a shifted pass for "shifted", else from an unshifted one.
        mode: "shifted", "pooled" or "unshifted".
        anchor_pivot: the pivot's representations are targets alone; no gradient goes through them.
        temperature: τ > 0.
        standardise: contrast them standardised over the batch; "pooled" has a way of its own.

    Returns:
        () float32, differentiable in both.

    Raises:
        ValueError: unknown mode, a temperature that is not positive, shapes that do not fit, ``standardise`` with
            "pooled".
    """
    _check(mode, temperature, standardise)
    pivot = pivot.detach() if anchor_pivot else pivot
    if standardise:
        pivot, other = standardised(pivot, other)
    return ops.info_nce(pivot, other, scale=1 / temperature, recenter=mode == "pooled").mean()


def standardised(pivot: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(L, N, d) of both sides, each less its mean over N, over the standard deviation of both; differentiable."""
    pivot, other = (side - side.mean(1, keepdim=True) for side in (pivot, other))
    variance = (pivot.square().mean(1, keepdim=True) + other.square().mean(1, keepdim=True)) / 2
    # The second term bounds what a dimension gets in which all rows are nearly alike.
    scale = (variance + _LEAST * variance.mean(-1, keepdim=True)).clamp_min(_LEAST**2).rsqrt()
    return pivot * scale, other * scale


def mcl_loss(
    model: nn.Module,
    batch: ContrastiveBatch,
    handle: ShiftHandle,
    *,
    mode: MclMode = "shifted",
    temperature: float = 0.05,
    anchor_pivot: bool = False,
    standardise: bool = False,
    mini_batch_size: int | None = None,
    gather_across_devices: bool = False,
    pairs_by_process: Sequence[int] | None = None,
    follow: Callable[[Tensor], None] | None = None,
    see_pivot: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """L_mcl of a batch of translation pairs, for the area [f, b) of an attached model.

    One pass for both languages, through blocks 0 … b-2 only: no later block, no LM head.

    Args:
        model: the attached model, or what wraps it.
        batch: see :class:`ContrastiveBatch`; it is moved to the model's device.
        handle: what ``attach`` returned.
        mode, temperature, anchor_pivot, standardise: as for :func:`mcl_from_representations`.
        mini_batch_size: pairs in one pass. A larger batch runs in several, one after another, with the same loss
            and gradients and the memory of one (:mod:`.gradient_cache`). None: all in one pass.
        gather_across_devices: contrast with the pairs of all processes. Every process gets the same loss, the mean
            over all pairs, and its share of the gradient times the number of processes: what processes that average
            their gradients (DDP, FSDP, DeepSpeed) have to begin with. No sentence should be with two processes.
        pairs_by_process: how many pairs each process has, where that is known: it saves asking, which waits for the
            device.
        follow: called with the (2, 2N, d) representations at f and b of an unshifted pass without gradients, which
            shares with the one at hand what is the same in both. Not with several passes.
        see_pivot: called with the (2, N, d) representations of this process's pivot sentences at f and b, and their
            graph. The pass then runs one block further, up to b.

    Returns:
        () float32 with a graph to the model's parameters.

    Raises:
        ValueError: unknown mode, a temperature that is not positive, ``standardise`` with "pooled", an odd number
            of rows, a process without pairs, processes that would need unequal numbers of passes.
    """
    _check(mode, temperature, standardise)
    gathers = gather_across_devices and dist.is_available() and dist.is_initialized()
    if (
        gathers and pairs_by_process is None
    ):  # before a refusal by one process, which the others would wait for
        pairs_by_process = pairs_of_processes(batch["input_ids"].shape[0] // 2, _device_of(model))
    counts = pairs_by_process if gathers and pairs_by_process else [_count_pairs(batch)]
    inside = handle.backward - handle.forward
    pivot, other = contrastive_representations(
        model,
        batch,
        range(handle.forward, handle.backward + (see_pivot is not None)),
        shifted=mode == "shifted",
        keep_massive=handle.recipe == "official",
        passes=passes_needed(counts, mini_batch_size),
        follow=None if follow is None else ((handle.forward, handle.backward), follow),
    )
    if see_pivot is not None:
        see_pivot(pivot[[0, inside]])
        pivot, other = pivot[:inside], other[:inside]
    if gathers:
        pivot, other = gather_pairs(pivot, counts), gather_pairs(other, counts)
    return mcl_from_representations(
        pivot,
        other,
        mode=mode,
        temperature=temperature,
        anchor_pivot=anchor_pivot,
        standardise=standardise,
    )


def contrastive_representations(
    model: nn.Module,
    batch: ContrastiveBatch,
    boundaries: Sequence[int],
    *,
    shifted: bool,
    keep_massive: bool = False,
    passes: int = 1,
    follow: tuple[Sequence[int], Callable[[Tensor], None]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Representations of a batch's pivot sentences and of their translations, each (len(boundaries), N, d) float32.

    ``keep_massive``: see :func:`boundary_representations`. ``passes``: how many the batch is divided into.
    ``follow``: boundaries, and what is called with the representations of an unshifted pass there.

    Raises:
        ValueError: an odd number of rows; ``follow`` with several passes.
    """
    pairs = _count_pairs(batch)
    if follow is not None and passes > 1:
        raise ValueError(f"follow: got one with {passes} passes, some of which run twice; wanted one pass")

    def encode(part: Mapping[str, Tensor]) -> Tensor:
        sentences = part["input_ids"], part["attention_mask"], part["pool_mask"]
        ids = part["language_ids"] if shifted else None
        if follow is None:
            return boundary_representations(model, *sentences, boundaries, ids, keep_massive=keep_massive)
        at, show = follow
        found, unshifted = representations_and_unshifted(
            model, *sentences, boundaries, at, ids, keep_massive=keep_massive
        )
        show(unshifted)
        return found

    rows: dict[str, Tensor] = {**batch}  # type: ignore[dict-item]
    parts = [rows]
    if passes > 1:
        parts = [_part_of(rows, pairs * i // passes, pairs * (i + 1) // passes) for i in range(passes)]
    parts = [_placed(part, _device_of(model)) for part in parts]
    halves = [part.chunk(2, dim=1) for part in encode_in_turns(encode, parts)]
    return torch.cat([pivot for pivot, _ in halves], 1), torch.cat([other for _, other in halves], 1)


def _count_pairs(batch: ContrastiveBatch) -> int:
    rows = batch["input_ids"].shape[0]
    if rows == 0 or rows % 2:
        raise ValueError(f"batch: got {rows} rows; wanted N pivot sentences and their N translations")
    return rows // 2


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _placed(part: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A part where the model is, but for its attention mask: on the host, it tells how to pack the sentences."""
    return {
        name: values if name == "attention_mask" else to_device(values, device)
        for name, values in part.items()
    }


def _part_of(batch: Mapping[str, Tensor], first: int, end: int) -> dict[str, Tensor]:
    """Some pairs of a batch: their pivot sentences, then their translations; no wider than the longest."""
    part = {name: torch.cat([half[first:end] for half in values.chunk(2)]) for name, values in batch.items()}
    mask = part["attention_mask"]
    if mask.device.type != "cpu":  # looking would cost a synchronisation
        return part
    width = int(mask.any(0).nonzero().max()) + 1
    return {name: values[:, :width] if values.dim() == 2 else values for name, values in part.items()}


def _check(mode: str, temperature: float, standardise: bool) -> None:
    if mode not in get_args(MclMode):
        raise ValueError(f"mode: got {mode!r}; wanted one of {', '.join(get_args(MclMode))}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}; wanted a positive number")
    if standardise and mode == "pooled":
        raise ValueError(
            "standardise: got True with mode 'pooled', which re-centres unit vectors; wanted another mode"
        )
