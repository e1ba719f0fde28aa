"""Ways to move a language's hidden states toward the pivot's at boundary f, and back at b.

The *mean shift* is ShifCon's (arXiv 2410.19453). The others are what it is compared with, or controls. With μ a
language's mean representation, V its basis, s the language, p the pivot, and r = (I - V_s V_sᵀ)(x - μ_s):

    mean        x + μ_p - μ_s
    random      x + ‖μ_p - μ_s‖ u_s, with a random unit vector u_s: the control for the mean shift
    centre      x - μ_s, for the pivot's rows too (Libovický et al. 2020, arXiv 2004.05160)
    subspace    μ_p + V_p V_pᵀ (x - μ_s) (Chang et al. 2022, arXiv 2205.10964)
    affine      μ_p + r + V_p M V_sᵀ (x - μ_s), M the least-squares map between the coordinates of translations
                (in the spirit of INCLINE, Wang et al. 2024, arXiv 2410.12462)
    procrustes  the same with M the orthogonal map (Schönemann 1966)

At b the two languages change places, and a random or centring shift is taken back with μ of b. Fitting M on the
coordinates of the subspaces, and leaving r as it is, is what a few hundred sentences can support in d dimensions:
outside of their span nothing is known, and the map is the identity there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shifcon_fast.space.subspace import Subspace

InterventionName = Literal["mean", "random", "centre", "subspace", "affine", "procrustes"]
INTERVENTIONS: tuple[InterventionName, ...] = get_args(InterventionName)

MAPS: frozenset[str] = frozenset({"subspace", "affine", "procrustes"})
"""Those that are no constant for a language: they need subspaces, and no export can write them down."""


def check_intervention(name: str) -> None:
    """Refuse a name that is none of :data:`INTERVENTIONS` with a ValueError."""
    if name not in INTERVENTIONS:
        raise ValueError(f"intervention: got {name!r}; wanted one of {', '.join(INTERVENTIONS)}")


@dataclass(frozen=True, eq=False)
class ProjectionTables:
    """x′ = x + α (μ_t + V_t V_tᵀ (x - μ_s) - x) at one boundary.

    Attributes:
        mean: (K, d) float32.
        basis: (K, d, k) float32, orthonormal columns, or columns of zeros.
        pivot: row of the pivot.
        toward: s is the row's language and t the pivot; else the other way round.
        alpha: α, or (K,) float32 one for each language.
    """

    mean: Tensor
    basis: Tensor
    pivot: int
    toward: bool
    alpha: float | Tensor


@dataclass(frozen=True, eq=False)
class MapTables:
    """x′ = x + offset[l] + left[l] right[l]ᵀ (x - source[l]) at one boundary, for rows of language l.

    Attributes:
        offset, source: (K, d) float32; α is in the offset.
        left, right: (K, d, k) float32; α is in the left one.
    """

    offset: Tensor
    source: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class FittedSubspaces:
    """What is known of K languages at one boundary.

    Attributes:
        subspaces: language → its subspace, in the order of the language ids.
        covariances: language → (k_pivot, k), of the coordinates of translations; see :class:`.LanguageSpace`.
        ridge: ε of the subspace distance, the variance outside of the subspaces in each direction.
    """

    subspaces: Mapping[str, Subspace]
    covariances: Mapping[str, Tensor]
    ridge: float


def check_fitted(end: FittedSubspaces, pivot: str, intervention: str) -> None:
    """Refuse a boundary whose subspaces cannot give a map.

    Raises:
        ValueError: a subspace of rank 0, or no covariances, which older versions did not estimate.
    """
    if empty := [code for code, each in end.subspaces.items() if not each.rank]:
        raise ValueError(
            f"intervention: {intervention!r} moves along subspaces, and that of {empty[0]!r} has rank 0: the model "
            "tells its sentences not apart. Estimate the space on more of them"
        )
    for code in end.subspaces:
        if intervention != "subspace" and code != pivot:
            _covariance(end, code, intervention)


def fit_maps(ends: Sequence[FittedSubspaces], pivot: str, intervention: str) -> dict[str, Tensor]:
    """``bases``, ``links`` and ``spread`` of a :class:`.LanguageShift`, whose intervention is a map.

    Args:
        ends: at f and at b.
        pivot, intervention: as for the shift.

    Raises:
        ValueError: as :func:`check_fitted`.
    """
    for end in ends:
        check_fitted(end, pivot, intervention)
    languages = list(ends[0].subspaces)
    rank = max(each.rank for end in ends for each in end.subspaces.values())
    bases = [_same_rank([each.basis for each in end.subspaces.values()], rank) for end in ends]
    links, spread = torch.zeros(2, len(languages), rank, rank), torch.zeros(2, len(languages))
    for at, end in enumerate(ends):
        for position, code in enumerate(languages):
            if code == pivot:
                continue
            source, target = (code, pivot) if at == 0 else (pivot, code)
            own, other = end.subspaces[source], end.subspaces[target]
            link = None
            if intervention != "subspace":
                covariance = _covariance(end, code, intervention)
                covariance = covariance if at == 0 else covariance.T
                link = _link(intervention, covariance, own.variances, end.ridge)
                links[at, position, : other.rank, : own.rank] = link
            spread[at, position] = _spread(own, end.ridge, other, link)
    found = {"bases": torch.stack(bases), "spread": spread}
    return found if intervention == "subspace" else {**found, "links": links}


def random_directions(languages: int, hidden_size: int, seed: int) -> Tensor:
    """(languages, hidden_size) float32 unit vectors, drawn anew for each seed."""
    drawn = torch.randn(languages, hidden_size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def _covariance(end: FittedSubspaces, code: str, intervention: str) -> Tensor:
    if code not in end.covariances:
        raise ValueError(
            f"intervention: {intervention!r} needs to know how translations vary together, which this space does "
            f"not hold of {code!r}: it was estimated by an older version. Estimate it again (shifcon profile)"
        )
    return end.covariances[code]


def _link(kind: str, covariance: Tensor, variances: Tensor, ridge: float) -> Tensor:
    """M, (k_to, k_from) float64: the least-squares or the orthogonal map between coordinates."""
    covariance = covariance.double()
    if kind == "affine":
        return covariance / (variances.double() + ridge)
    left, _, right = torch.linalg.svd(covariance, full_matrices=False)
    return left @ right


def _spread(own: Subspace, ridge: float, other: Subspace, link: Tensor | None) -> float:
    """√E‖(map - 1)(x - μ)‖² over sentences x of a language: how far a map moves them beside their mean.

    Sentences vary as the model of the subspaces says (probabilistic PCA): V diag(variances) Vᵀ + ε (I - V Vᵀ).
    Without ``link``, the map is the projection onto ``other``.
    """
    basis, variances, target = own.basis.double(), own.variances.double(), other.basis.double()
    if link is not None:
        moved = target @ link - basis
        return float((variances * moved.square().sum(0)).sum().sqrt())
    overlap = (target.T @ basis).square()
    total = variances.sum() + ridge * (len(basis) - own.rank)
    kept = (variances * overlap.sum(0)).sum() + ridge * (other.rank - overlap.sum())
    return float((total - kept).clamp_min(0).sqrt())


def _same_rank(bases: list[Tensor], rank: int) -> Tensor:
    """(K, d, rank): bases filled up with columns of zeros, which no product sees."""
    return torch.stack([torch.nn.functional.pad(each, (0, rank - each.shape[1])) for each in bases])
