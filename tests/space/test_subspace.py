"""Subspaces against NumPy's SVD, distances against the full d × d generalised eigenvalue problem, in float64."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from shifcon_fast.space.subspace import (
    Subspace,
    common_ridge,
    principal_subspace,
    principal_subspaces,
    subspace_distance,
    subspace_distances,
)


def anisotropic(n: int, d: int, seed: int = 0) -> Tensor:
    """Rows with a decaying spectrum around a far-away mean, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    scales = 0.8 ** torch.arange(d, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scales @ rotation + 10.0


def random_subspace(d: int, k: int, seed: int) -> Subspace:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q
    return Subspace(torch.zeros(d), basis, torch.rand(k, generator=generator, dtype=torch.float64) + 0.1)


def full_distance(a: Subspace, b: Subspace, ridge: float) -> float:
    """The definition, with the d × d matrices written out and 40 digits."""
    with mpmath.workdps(40):
        ka, kb = (
            mpmath.matrix(s.basis.tolist())
            * mpmath.diag(s.variances.tolist())
            * mpmath.matrix(s.basis.tolist()).T
            + ridge * mpmath.eye(s.basis.shape[0])
            if s.rank
            else ridge * mpmath.eye(s.basis.shape[0])
            for s in (a, b)
        )
        whiten = mpmath.cholesky(ka) ** -1
        eigenvalues = mpmath.eigsy(whiten * kb * whiten.T, eigvals_only=True)
        return float(mpmath.sqrt(sum(mpmath.log(value) ** 2 for value in eigenvalues)))


@pytest.mark.parametrize(("n", "d"), [(12, 40), (60, 20), (20, 20), (2, 7)])
@pytest.mark.parametrize("variance", [0.5, 0.9, 0.999])
def test_principal_subspace_is_the_truncated_svd(n: int, d: int, variance: float) -> None:
    x = anisotropic(n, d)
    _, s, vt = np.linalg.svd(x.numpy() - x.numpy().mean(0), full_matrices=False)
    share = (s**2).cumsum() / (s**2).sum()
    k = int(np.argmax(share >= variance)) + 1

    subspace = principal_subspace(x, variance=variance)

    assert subspace.rank == k
    np.testing.assert_allclose(subspace.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(subspace.variances, s[:k] ** 2 / (n - 1), rtol=1e-10)
    np.testing.assert_allclose(subspace.discarded, (s[k:] ** 2).sum() / (n - 1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(subspace.basis.T @ subspace.basis, np.eye(k), atol=1e-12)
    signs = np.sign((vt[:k] * subspace.basis.T.numpy()).sum(1))
    np.testing.assert_allclose(subspace.basis.T, vt[:k] * signs[:, None], atol=1e-8)


def test_rank_overrides_variance_and_stops_at_what_the_data_span() -> None:
    x = anisotropic(10, 30)
    assert principal_subspace(x, rank=3, variance=0.999).rank == 3
    assert principal_subspace(x, rank=25).rank == 9  # ten centred rows span nine directions
    assert principal_subspace(x, variance=1.0).rank == 9
    assert principal_subspace(torch.cat([x[:3]] * 4), rank=8).rank == 2


def test_every_column_points_to_its_largest_entry() -> None:
    for x in (anisotropic(12, 40), anisotropic(60, 20)):
        for data in (x, -x):
            basis = principal_subspace(data, rank=5).basis
            assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
        torch.testing.assert_close(
            principal_subspace(x, rank=5).basis, principal_subspace(-x, rank=5).basis, rtol=0, atol=1e-10
        )


def test_identical_sentences_have_no_directions_and_no_distance() -> None:
    point = principal_subspace(torch.ones(5, 8))
    assert point.rank == 0
    assert point.discarded == 0.0
    other = random_subspace(8, 2, seed=0)
    assert subspace_distance(point, point, common_ridge([point])) == 0.0
    expected = math.sqrt(sum(math.log((v + 0.1) / 0.1) ** 2 for v in other.variances.tolist()))
    assert subspace_distance(point, other, 0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("ka", "kb"), [(3, 5), (5, 3), (1, 1), (0, 4), (14, 13), (20, 20)])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_distance_equals_the_full_problem(ka: int, kb: int, ridge: float) -> None:
    a, b = random_subspace(20, ka, seed=1), random_subspace(20, kb, seed=2)
    assert subspace_distance(a, b, ridge) == pytest.approx(full_distance(a, b, ridge), rel=1e-9)
    assert subspace_distance(b, a, ridge) == pytest.approx(subspace_distance(a, b, ridge), rel=1e-9)


def test_distance_of_overlapping_subspaces_equals_the_full_problem() -> None:
    a = random_subspace(30, 6, seed=3)
    fresh = random_subspace(30, 10, seed=4).basis
    shared = torch.linalg.qr(torch.cat([a.basis[:, :4], fresh[:, :3]], dim=1)).Q
    b = Subspace(a.mean, shared, torch.linspace(0.2, 3.0, 7, dtype=torch.float64))
    assert subspace_distance(a, b, 0.05) == pytest.approx(full_distance(a, b, 0.05), rel=1e-9)


def test_distance_in_a_shared_basis_is_the_closed_form() -> None:
    a = random_subspace(16, 3, seed=5)
    b = Subspace(a.mean + 7.0, a.basis, a.variances * torch.tensor([4.0, 0.5, 1.0]))
    ridge = 0.3
    expected = ((b.variances + ridge) / (a.variances + ridge)).log().square().sum().sqrt()
    assert subspace_distance(a, b, ridge) == pytest.approx(float(expected), rel=1e-10)
    assert subspace_distance(a, a, ridge) == pytest.approx(0.0, abs=1e-10)


def test_distance_does_not_depend_on_the_coordinates() -> None:
    a, b = random_subspace(24, 4, seed=6), random_subspace(24, 6, seed=7)
    rotation = random_subspace(24, 24, seed=8).basis
    turned = [Subspace(s.mean, rotation @ s.basis, s.variances) for s in (a, b)]
    assert subspace_distance(*turned, 0.1) == pytest.approx(subspace_distance(a, b, 0.1), rel=1e-10)


def test_common_ridge_is_the_noise_variance_of_probabilistic_pca() -> None:
    x, y = anisotropic(50, 20, seed=1), 3 * anisotropic(80, 20, seed=2)
    noise = []
    for data, k in ((x, 4), (y, 4)):
        eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(data.numpy().T)))[::-1]
        noise.append(eigenvalues[k:].mean())  # Tipping & Bishop 1999, eq. 8
    ridge = common_ridge([principal_subspace(x, rank=4), principal_subspace(y, rank=4)])
    assert ridge == pytest.approx(np.mean(noise), rel=1e-10)


def test_ridge_stays_positive_when_nothing_is_discarded() -> None:
    x = anisotropic(50, 6)
    whole = principal_subspace(x, variance=1.0)
    average = np.trace(np.cov(x.numpy().T)) / 6
    assert common_ridge([whole]) == pytest.approx(1e-8 * average, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(5)}, r"x: got shape \(5,\)"),
        ({"x": torch.zeros(1, 5)}, "at least two rows"),
        ({"x": torch.full((3, 5), float("nan"))}, "NaN or infinity"),
        ({"x": torch.randn(3, 5), "rank": 0}, "rank: got 0"),
        ({"x": torch.randn(3, 5), "variance": 1.5}, "variance: got 1.5"),
        ({"x": torch.randn(3, 5), "variance": 0.0}, "variance: got 0.0"),
    ],
)
def test_principal_subspace_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        principal_subspace(**arguments)  # type: ignore[arg-type]


def test_distance_refuses_another_hidden_size_and_a_ridge_that_is_none() -> None:
    with pytest.raises(ValueError, match="hidden size 9 but a has 8"):
        subspace_distance(random_subspace(8, 2, 0), random_subspace(9, 2, 0), 0.1)
    with pytest.raises(ValueError, match="ridge: got 0"):
        subspace_distance(random_subspace(8, 2, 0), random_subspace(8, 2, 1), 0.0)
    with pytest.raises(ValueError, match="subspaces: got none"):
        common_ridge([])


def test_many_at_once_are_each_alone() -> None:
    # Sets of different ranks: full, of three points, of one point.
    x = torch.stack([anisotropic(10, 16, seed) for seed in range(4)])
    x[1] = torch.cat([x[1, :3]] * 4)[:10]
    x[2] = 1.0
    for arguments in ({"rank": 5}, {"variance": 0.7}, {"variance": 0.9}):
        together = principal_subspaces(x, **arguments)
        alone = [principal_subspace(each, **arguments) for each in x]
        for one, other in zip(together, alone, strict=True):
            assert one.rank == other.rank
            assert one.discarded == pytest.approx(other.discarded, rel=1e-9, abs=1e-12)
            torch.testing.assert_close(one.basis, other.basis, rtol=0, atol=1e-9)
            torch.testing.assert_close(one.variances, other.variances, rtol=1e-9, atol=1e-12)
        assert together[2].rank == 0
        pairs = [(a, b) for a in together for b in together]
        ridges = [0.1 + 0.01 * index for index in range(len(pairs))]
        expected = [subspace_distance(*pair, ridge) for pair, ridge in zip(pairs, ridges, strict=True)]
        assert subspace_distances(pairs, ridges) == pytest.approx(expected, rel=1e-9, abs=1e-9)
