"""Which language a text is in, from its own representation: linear discriminant analysis of sentences.

The shared within-language covariance S of n sentences in d dimensions is singular for n < d. It is shrunk towards
the identity by the rule of Chen, Wiesel, Eldar & Hero 2010, *Shrinkage Algorithms for MMSE Covariance Estimation*
(OAS, https://arxiv.org/abs/0907.4698), after every dimension was scaled by its own deviation: hidden states have a
few dimensions that are hundreds of times larger than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LanguageRouter:
    """P(language | r) = softmax(weight · r + bias): Gaussians of one covariance, languages equally likely.

    Attributes:
        weight: (K, d) float32.
        bias: (K,) float32.
    """

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"router: got weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)}; wanted (K, d) "
                "and (K,)"
            )

    def probabilities(self, representations: Tensor) -> Tensor:
        """(B, K) float32, from (B, d) sentence representations at the router's boundary."""
        weight, bias = (each.to(representations.device) for each in (self.weight, self.bias))
        return torch.softmax(representations.float() @ weight.T + bias, dim=-1)


def fit_router(representations: Sequence[Tensor]) -> LanguageRouter:
    """Fit to the (n, d) sentence representations of each language, n ≥ 2."""
    means = torch.stack([each.double().mean(0) for each in representations])
    within = torch.cat([each.double() - mean for each, mean in zip(representations, means, strict=True)])
    freedom = max(1, within.shape[0] - len(representations))
    scale = (within.square().sum(0) / freedom).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    within, scaled = within / scale, means / scale
    inverse_times_means = _solve_shrunk(within, freedom, scaled)  # (K, d)
    bias = -0.5 * (inverse_times_means * scaled).sum(1)
    return LanguageRouter((inverse_times_means / scale).float(), bias.float())


def _solve_shrunk(rows: Tensor, freedom: int, targets: Tensor) -> Tensor:
    """((1 - ρ) S + ρ μ I)⁻¹ targetsᵀ, transposed; S = rowsᵀ rows / freedom, μ = tr(S) / d, ρ by OAS.

    In the smaller of n and d dimensions: (ρμ I + (1 - ρ) AᵀA)⁻¹ = (I - Aᵀ (c I + A Aᵀ)⁻¹ A) / (ρμ) with
    c = ρμ / (1 - ρ).
    """
    n, d = rows.shape
    a = rows / freedom**0.5
    gram = a @ a.T if n < d else a.T @ a
    trace, square = float(gram.diagonal().sum()), float(gram.square().sum())
    mu = trace / d
    if mu == 0:
        return targets  # no sentence differs from another of its language
    top = (1 - 2 / d) * square + trace**2
    bottom = (freedom + 1 - 2 / d) * (square - trace**2 / d)
    rho = 1.0 if bottom <= 0 else min(1.0, top / bottom)
    if rho == 1.0:
        return targets / mu
    identity = torch.eye(len(gram), dtype=gram.dtype)
    if n < d:
        correction = torch.linalg.solve(rho * mu / (1 - rho) * identity + gram, a @ targets.T)
        return (targets - (a.T @ correction).T) / (rho * mu)
    return torch.linalg.solve((1 - rho) * gram + rho * mu * identity, targets.T).T
