"""Affine language subspaces and the exact distance between two of them.

A language's sentence representations at a boundary are summarised as in Chang et al. 2022, *The Geometry of
Multilingual Language Model Representations* (https://arxiv.org/abs/2205.10964): a mean, and the leading principal
directions of the centred representations. Two subspaces are compared as covariance matrices by the affine-invariant
Riemannian distance (Bonnabel & Sepulchre 2009, https://arxiv.org/abs/0807.4462, which Chang et al. use). The ridge
that makes the low-rank covariances definite is the noise variance of probabilistic PCA (Tipping & Bishop 1999,
eq. 8): the average variance, per dimension, of what the subspace leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    check_truncation(rank, variance)
    x = x.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(x).all():
        raise ValueError("x: holds NaN or infinity; the hidden states overflowed or the model is broken")
    n, d = x.shape
    mean = x.mean(0)
    centred = x - mean
    # The smaller Gram matrix has the same spectrum as the covariance: O(nd·min(n, d)) and cheaper than an SVD.
    wide = n < d
    eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    squares, vectors = eigenvalues.flip(0).clamp_min(0), vectors.flip(1)
    total = float(squares.sum())
    significant = int((squares > squares[0] * max(n, d) * torch.finfo(torch.float64).eps).sum())
    if rank is None:
        # The tolerance is float64's summation error: variance=1.0 must not ask for directions of pure round-off.
        reached = squares.cumsum(0) >= variance * total * (1 - 1e-12)
        rank = int(reached.int().argmax()) + 1
    k = min(rank, significant)
    basis = vectors[:, :k]
    if wide:
        # Xᵀu/s loses orthogonality as s shrinks; QR restores it without leaving the span.
        basis = torch.linalg.qr(centred.T @ basis / squares[:k].sqrt()).Q
    peaks = basis.gather(0, basis.abs().argmax(0, keepdim=True)) if k else basis.new_ones(1, 0)
    basis = basis * torch.where(peaks < 0, -1.0, 1.0)
    return Subspace(mean, basis, squares[:k] / (n - 1), float(squares[k:].sum()) / (n - 1))


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
    if a.basis.shape[0] != b.basis.shape[0]:
        raise ValueError(
            f"b: has hidden size {b.basis.shape[0]} but a has {a.basis.shape[0]}; both must come from one boundary"
        )
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge: got {ridge}; wanted a positive finite variance (see common_ridge)")
    bases = [s.basis.detach().to(device="cpu", dtype=torch.float64) for s in (a, b)]
    joint = torch.linalg.qr(torch.cat(bases, dim=1)).Q
    if joint.shape[1] == 0:
        return 0.0
    covariances = []
    for basis, subspace in zip(bases, (a, b), strict=True):
        inside = joint.T @ basis
        variances = subspace.variances.detach().to(device="cpu", dtype=torch.float64)
        covariances.append(
            (inside * variances) @ inside.T + ridge * torch.eye(joint.shape[1], dtype=torch.float64)
        )
    # The solver's error is relative to the largest λ, which ruins small ones when variances span many orders. Small
    # ones are the large ones of the swapped problem, inverted, so both are solved.
    a_to_b, b_to_a = _generalised_eigenvalues(*covariances), _generalised_eigenvalues(*reversed(covariances))
    above = int((a_to_b > 1).sum())
    logarithms = torch.cat([a_to_b[len(a_to_b) - above :].log(), b_to_a[above:].log()])
    return float(logarithms.square().sum().sqrt())


def _generalised_eigenvalues(k_a: Tensor, k_b: Tensor) -> Tensor:
    """λ of K_B v = λ K_A v, ascending."""
    return torch.from_numpy(scipy.linalg.eigh(k_b.numpy(), k_a.numpy(), eigvals_only=True))
