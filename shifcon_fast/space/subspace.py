"""Affine language subspaces and the exact distance between two of them.

A language's sentence representations at a boundary are summarised as in Chang et al. 2022, *The Geometry of
Multilingual Language Model Representations* (https://arxiv.org/abs/2205.10964): a mean, and the leading principal
directions of the centred representations. Two subspaces are compared as covariance matrices by the affine-invariant
Riemannian distance (Bonnabel & Sepulchre 2009, https://arxiv.org/abs/0807.4462, which Chang et al. use). The ridge
that makes the low-rank covariances definite is the noise variance of probabilistic PCA (Tipping & Bishop 1999,
eq. 8): the average variance, per dimension, of what the subspace leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

# Without any discarded variance (every direction kept) PPCA's noise variance is zero and the covariances singular.
_SMALLEST_RIDGE = 1e-8


@dataclass(frozen=True, eq=False)
class Subspace:
    """An affine subspace of the hidden states.

    Attributes:
        mean: (d,), the point through which it goes.
        basis: (d, k), orthonormal columns, by decreasing variance; each column's largest entry is positive.
        variances: (k,), s²/(n−1) along each column, in squared units of the hidden states.
        discarded: variance outside the basis, summed over the d − k remaining directions.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    discarded: float = 0.0

    @property
    def rank(self) -> int:
        """k, the number of directions."""
        return self.basis.shape[1]


DEFAULT_RANK = 32
"""Directions of every subspace, unless asked for otherwise: distances compare at equal rank only."""


def principal_subspace(x: Tensor, *, rank: int | None = None, variance: float = 0.9) -> Subspace:
    """The subspace of the leading principal directions of representations, in float64 on the CPU.

    Args:
        x: (n, d) representations, any floating dtype and device, n ≥ 2.
        rank: number of directions; where the data span fewer (at most n − 1), those.
        variance: without ``rank``, keep the fewest directions that hold at least this share of Σs².

    Raises:
        ValueError: ``x`` is not two-dimensional, has fewer than two rows or non-finite values; ``rank`` < 1;
            ``variance`` outside (0, 1].
    """
    if x.dim() != 2 or x.shape[0] < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}; wanted (n, d) with at least two rows")
    return principal_subspaces(x[None], rank=rank, variance=variance)[0]


def principal_subspaces(x: Tensor, *, rank: int | None = None, variance: float = 0.9) -> list[Subspace]:
    """:func:`principal_subspace` of each of m sets of representations, (m, n, d).

    All at once: of a few dozen sentences, single calls cost three times what the arithmetic costs.
    """
    check_truncation(rank, variance)
    x = x.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(x).all():
        raise ValueError("x: holds NaN or infinity; the hidden states overflowed or the model is broken")
    n, d = x.shape[1:]
    means = x.mean(1)
    centred = x - means[:, None]
    # The smaller Gram matrix has the same spectrum as the covariance: O(nd·min(n, d)) and cheaper than an SVD.
    wide = n < d
    eigenvalues, vectors = torch.linalg.eigh(centred @ centred.mT if wide else centred.mT @ centred)
    squares, vectors = eigenvalues.flip(-1).clamp_min(0), vectors.flip(-1)
    totals = squares.sum(-1, keepdim=True)
    significant = squares > squares[:, :1] * max(n, d) * torch.finfo(torch.float64).eps
    ranks = significant.sum(-1)
    if rank is None:
        # The tolerance is float64's summation error: variance=1.0 must not ask for directions of pure round-off.
        reached = squares.cumsum(-1) >= variance * totals * (1 - 1e-12)
        ranks = torch.minimum(ranks, reached.int().argmax(-1) + 1)
    else:
        ranks = ranks.clamp_max(rank)
    found: list[Subspace] = [None] * len(x)  # type: ignore[list-item]
    for k in ranks.unique().tolist():
        of_rank = (ranks == k).nonzero()[:, 0]
        basis = vectors[of_rank, :, :k]
        if wide:
            # Xᵀu/s loses orthogonality as s shrinks; QR restores it without leaving the span.
            basis = torch.linalg.qr(centred[of_rank].mT @ basis / squares[of_rank, None, :k].sqrt()).Q
        if k:
            peaks = basis.gather(1, basis.abs().argmax(1, keepdim=True))
            basis = basis * torch.where(peaks < 0, -1.0, 1.0)
        for each, index in zip(basis, of_rank.tolist(), strict=True):
            variances = squares[index] / (n - 1)
            found[index] = Subspace(means[index], each, variances[:k], float(variances[k:].sum()))
    return found


def equal_rank(counts: Iterable[int]) -> int:
    """The default rank for languages with so many sentences: 32, or what their halves can have (n // 2 − 1)."""
    return max(1, min(DEFAULT_RANK, min(counts) // 2 - 1))


def check_truncation(rank: int | None, variance: float) -> None:
    """Raise ValueError unless ``rank`` is None or ≥ 1 and ``variance`` lies in (0, 1]."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank: got {rank}; wanted at least 1")
    if not 0 < variance <= 1:
        raise ValueError(f"variance: got {variance}; wanted a share of the variance in (0, 1]")


def common_ridge(subspaces: Iterable[Subspace]) -> float:
    """ε of one boundary: PPCA's noise variance, discarded/(d − k), averaged over its languages.

    One ε for all languages, so that directions outside both subspaces contribute nothing to a distance. Never below
    1e-8 of the average variance per dimension, so that covariances stay definite when every direction is kept.
    """
    noise, average = [], []
    for subspace in subspaces:
        d = subspace.basis.shape[0]
        noise.append(subspace.discarded / max(1, d - subspace.rank))
        average.append((subspace.discarded + float(subspace.variances.sum())) / d)
    if not noise:
        raise ValueError("subspaces: got none; wanted at least one language's subspace")
    ridge = max(sum(noise) / len(noise), _SMALLEST_RIDGE * sum(average) / len(average))
    return (
        ridge if ridge > 0 else 1.0
    )  # no variance anywhere: every covariance is εI, and any ε gives distance 0


def subspace_distance(a: Subspace, b: Subspace, ridge: float) -> float:
    """D(A, B) = √Σᵢ log² λᵢ, λ the generalised eigenvalues of (K_B, K_A), K = V diag(variances) Vᵀ + ridge · I.

    Exact, and O(d k²): every direction outside span(V_A, V_B) has λ = 1 and contributes nothing, so the problem is
    solved inside that span, in float64. Symmetric; 0 for equal subspaces. The means play no part.

    Raises:
        ValueError: hidden sizes differ, or ``ridge`` is not positive and finite.
    """
    return subspace_distances([(a, b)], [ridge])[0]


def subspace_distances(pairs: Sequence[tuple[Subspace, Subspace]], ridges: Sequence[float]) -> list[float]:
    """:func:`subspace_distance` of each pair with its ridge; those of equal ranks at once."""
    alike: dict[tuple[int, int, int], list[int]] = {}
    for index, ((a, b), ridge) in enumerate(zip(pairs, ridges, strict=True)):
        if a.basis.shape[0] != b.basis.shape[0]:
            raise ValueError(
                f"b: has hidden size {b.basis.shape[0]} but a has {a.basis.shape[0]}; both must come from one "
                "boundary"
            )
        if not 0 < ridge < float("inf"):
            raise ValueError(f"ridge: got {ridge}; wanted a positive finite variance (see common_ridge)")
        alike.setdefault((a.basis.shape[0], a.rank, b.rank), []).append(index)
    distances = [0.0] * len(pairs)
    for (_, rank_a, rank_b), indices in alike.items():
        if rank_a + rank_b == 0:
            continue
        sides = [[pairs[index][side] for index in indices] for side in (0, 1)]
        bases = [torch.stack([_exact(each.basis) for each in side]) for side in sides]
        joint = torch.linalg.qr(torch.cat(bases, dim=2)).Q
        noise = torch.tensor([ridges[index] for index in indices], dtype=torch.float64)[:, None, None]
        of_ridge = noise * torch.eye(joint.shape[2], dtype=torch.float64)
        covariances = []
        for basis, side in zip(bases, sides, strict=True):
            inside = joint.mT @ basis
            spread = torch.stack([_exact(each.variances) for each in side])[:, None]
            covariances.append((inside * spread) @ inside.mT + of_ridge)
        for index, k_a, k_b in zip(indices, *covariances, strict=True):
            distances[index] = _distance(k_a, k_b)
    return distances


def _exact(x: Tensor) -> Tensor:
    return x.detach().to(device="cpu", dtype=torch.float64)


def _distance(k_a: Tensor, k_b: Tensor) -> float:
    # The solver's error is relative to the largest λ, which ruins small ones when variances span many orders. Small
    # ones are the large ones of the swapped problem, inverted, so both are solved.
    a_to_b, b_to_a = _generalised_eigenvalues(k_a, k_b), _generalised_eigenvalues(k_b, k_a)
    above = int((a_to_b > 1).sum())
    logarithms = np.log(np.concatenate([a_to_b[len(a_to_b) - above :], b_to_a[above:]]))
    return float(np.sqrt(np.square(logarithms).sum()))


def _generalised_eigenvalues(k_a: Tensor, k_b: Tensor) -> Any:
    """λ of K_B v = λ K_A v, ascending."""
    return scipy.linalg.eigh(k_b.numpy(), k_a.numpy(), eigvals_only=True)
