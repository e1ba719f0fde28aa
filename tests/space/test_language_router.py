"""The router against scikit-learn's formula written out in full, and on data whose best answer is known."""

from __future__ import annotations

import pytest
import torch

from shifcon_fast.space.language_router import LanguageRouter, fit_router


def sentences(n: int, d: int, *, languages: int = 3, seed: int = 0) -> list[torch.Tensor]:
    """Gaussians of one random covariance, with two dimensions that are 300 times larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator) / d**0.5 + torch.eye(d)
    mix[:, :2] *= 300
    means = torch.randn(languages, d, generator=generator)
    return [torch.randn(n, d, generator=generator) @ mix + mean for mean in means]


def plain(representations: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in d dimensions, with the covariance itself."""
    means = torch.stack([each.double().mean(0) for each in representations])
    centred = torch.cat([each.double() - mean for each, mean in zip(representations, means, strict=True)])
    freedom, d = len(centred) - len(representations), centred.shape[1]
    scale = (centred.square().sum(0) / freedom).sqrt()
    s = (centred / scale).T @ (centred / scale) / freedom
    mu = s.trace() / d
    rho = ((1 - 2 / d) * (s @ s).trace() + s.trace() ** 2) / (
        (freedom + 1 - 2 / d) * ((s @ s).trace() - s.trace() ** 2 / d)
    )
    rho = rho.clamp(max=1)
    weight = torch.linalg.solve((1 - rho) * s + rho * mu * torch.eye(d), (means / scale).T).T / scale
    return weight, -0.5 * (weight * means).sum(1)


@pytest.mark.parametrize(("n", "d"), [(4, 40), (30, 40), (60, 40)])
def test_the_formula(n: int, d: int) -> None:
    rows = sentences(n, d)
    router = fit_router(rows)
    weight, bias = plain(rows)
    torch.testing.assert_close(router.weight.double(), weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(router.bias.double(), bias, rtol=1e-5, atol=1e-5)


def test_new_sentences_find_their_language_where_the_nearest_mean_does_not() -> None:
    seen = sentences(80, 64)
    fresh = [each[40:] for each in seen]
    router = fit_router([each[:40] for each in seen])
    means = torch.stack([each[:40].mean(0) for each in seen])
    right, near = 0, 0
    for language, rows in enumerate(fresh):
        right += int((router.probabilities(rows).argmax(1) == language).sum())
        near += int((torch.cdist(rows, means).argmin(1) == language).sum())
    assert right >= 110, right  # of 120
    assert near <= 70, near
    p = router.probabilities(torch.cat(fresh))
    torch.testing.assert_close(p.sum(1), torch.ones(120))


def test_languages_without_any_variance_are_told_apart_by_their_means() -> None:
    rows = [torch.zeros(3, 4), torch.ones(3, 4)]
    assert fit_router(rows).probabilities(torch.tensor([[0.1] * 4, [0.9] * 4])).argmax(1).tolist() == [0, 1]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"router: got weight \(3, 4\) and bias \(2,\)"):
        LanguageRouter(torch.zeros(3, 4), torch.zeros(2))
