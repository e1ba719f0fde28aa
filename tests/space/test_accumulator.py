"""The streaming accumulator against plain float64 formulas over all representations at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shifcon_fast.space import accumulator
from shifcon_fast.space.accumulator import SpaceAccumulator, split_halves
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.subspace import common_ridge, principal_subspace, subspace_distance

BOUNDARIES, N, D = 3, 22, 12


def representations(n: int = N, d: int = D, seed: int = 0) -> dict[str, Tensor]:
    """(boundaries, n, d) for three languages with spectra, orientations and means of their own."""
    generator = torch.Generator().manual_seed(seed)
    scales = 0.7 ** torch.arange(d)
    return {
        language: torch.randn(BOUNDARIES, n, d, generator=generator)
        * scales
        @ torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        + 5 * torch.randn(BOUNDARIES, 1, d, generator=generator)
        for language in ("en", "de", "sw")
    }


def estimate(
    data: dict[str, Tensor],
    *,
    batch: int = 5,
    shuffle: int | None = None,
    memory_bytes: float = 1e9,
    **options: object,
) -> LanguageSpace:
    """Feed all data; ‖h‖² of a token is its sentence's ‖r‖²; sentence i has median norm i, sink share i/100."""
    counts = {language: x.shape[1] for language, x in data.items()}
    d = next(iter(data.values())).shape[2]
    accumulator = SpaceAccumulator(counts, "en", num_boundaries=BOUNDARIES, hidden_size=d, **options)  # type: ignore[arg-type]
    generator = None if shuffle is None else torch.Generator().manual_seed(shuffle)
    for boundaries in accumulator.ranges(range(BOUNDARIES), memory_bytes=memory_bytes):
        with accumulator.boundary_range(boundaries):
            for language, chunk in batches(counts, batch, generator):
                x = data[language][boundaries][:, chunk]
                accumulator.update(
                    language,
                    chunk,
                    x,
                    square_norms=x.double().square().sum((1, 2)),
                    tokens=torch.full((len(boundaries),), len(chunk)),
                    median_norms=torch.tensor(chunk).float().expand(len(boundaries), -1),
                    sink_shares=(torch.tensor(chunk) / 100).expand(len(boundaries), -1),
                )
    return accumulator.finish()


def batches(
    counts: dict[str, int], size: int, generator: torch.Generator | None
) -> Iterator[tuple[str, list[int]]]:
    for language, n in counts.items():
        order = list(range(n)) if generator is None else torch.randperm(n, generator=generator).tolist()
        for i in range(0, n, size):
            yield language, order[i : i + size]


def assert_same(a: LanguageSpace, b: LanguageSpace) -> None:
    for name in ("mean", "rms", "median_norm", "sink_share"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=2e-7, atol=1e-9)
    for name in ("ridge", "floors", "split_distances"):  # from the same matrices: no round-off at all
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.bases.keys() == b.bases.keys()
    assert all(torch.equal(a.bases[key], b.bases[key]) for key in a.bases)


def test_means_norms_and_sink_shares_are_the_float64_averages() -> None:
    data = representations()
    space = estimate(data)
    assert space.languages == ("en", "de", "sw")
    assert space.counts == {"en": N, "de": N, "sw": N}
    expected = torch.stack([data[language].double().mean(1) for language in space.languages], dim=1)
    torch.testing.assert_close(space.mean, expected.float(), rtol=1e-7, atol=0)
    squares = torch.cat([data[language].double().square().sum(2) for language in data], dim=1)
    torch.testing.assert_close(space.rms, squares.mean(1).sqrt().float(), rtol=1e-7, atol=0)
    everywhere = torch.ones(BOUNDARIES, 3)
    torch.testing.assert_close(space.median_norm, everywhere * (N - 1) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(space.sink_share, everywhere * (N - 1) / 200, rtol=1e-6, atol=0)
    shift = (expected[1, 0] - expected[1, 2]).norm() / squares[1].mean().sqrt()
    assert space.mean_gap(1, "sw") == pytest.approx(float(shift), rel=1e-6)


@pytest.mark.parametrize("at_once", [1, accumulator._REDUCED_AT_ONCE])
def test_subspaces_distances_and_floors_are_those_of_the_whole_matrices(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulator, "_REDUCED_AT_ONCE", at_once)
    data = representations()
    space = estimate(data, variance=0.8)
    for k in range(BOUNDARIES):
        whole = {language: principal_subspace(x[k], variance=0.8) for language, x in data.items()}
        first, second = (
            {language: principal_subspace(x[k, half], variance=0.8) for language, x in data.items()}
            for half in split_halves(N)
        )
        ridge = common_ridge(whole.values())
        for language in data:
            found = space.subspace(k, language)
            torch.testing.assert_close(found.basis, whole[language].basis.float())
            torch.testing.assert_close(found.variances, whole[language].variances.float())
            torch.testing.assert_close(found.mean, whole[language].mean.float())
            floor = subspace_distance(first[language], second[language], ridge)
            assert space.noise_floor(k, language) == pytest.approx(floor, rel=1e-6)
        distance = subspace_distance(whole["de"], whole["sw"], ridge)
        assert space.distance(k, "de", "sw") == pytest.approx(distance, rel=1e-5)
        assert space.distance(k, "sw", "de") == pytest.approx(distance, rel=1e-5)
        assert space.distance(k, "sw", "sw") == 0.0
        split = subspace_distance(first["sw"], second["en"], ridge) + subspace_distance(
            second["sw"], first["en"], ridge
        )
        assert space.split_distance(k, "sw") == pytest.approx(split / 2, rel=1e-6)
        assert space.split_distance(k, "en") == 0.0
        floors = [space.noise_floor(k, language) for language in data]
        assert space.noise_floor(k) == pytest.approx(sum(floors) / 3, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 100])
@pytest.mark.parametrize("shuffle", [None, 0, 1])
def test_neither_order_nor_size_of_batches_shows(batch: int, shuffle: int | None) -> None:
    data = representations()
    assert_same(estimate(data, batch=batch, shuffle=shuffle), estimate(data))


def test_ranges_of_boundaries_do_not_show() -> None:
    data = representations()
    assert_same(estimate(data, memory_bytes=1), estimate(data))


def test_ranges_fit_into_the_memory_and_start_at_the_deepest() -> None:
    accumulator = SpaceAccumulator({"en": 10, "sw": 10}, "en", num_boundaries=7, hidden_size=4)
    matrix = 20 * 4 * 4  # bytes of one boundary's float32 matrices
    assert accumulator.ranges(range(7), memory_bytes=3 * matrix) == [[4, 5, 6], [1, 2, 3], [0]]
    assert accumulator.ranges([5, 2], memory_bytes=2 * matrix - 1) == [[5], [2]]
    assert accumulator.ranges(range(7), memory_bytes=0) == [[6], [5], [4], [3], [2], [1], [0]]
    means_only = SpaceAccumulator(
        {"en": 10, "sw": 10}, "en", num_boundaries=7, hidden_size=4, subspaces=False
    )
    assert means_only.ranges(range(7), memory_bytes=0) == [[0, 1, 2, 3, 4, 5, 6]]


def test_long_sums_do_not_stagnate() -> None:
    # 4,096 additions of 1000.1: a float32 running sum is off by 1e-4 here, bfloat16 by everything.
    n = 4096
    data = {
        language: torch.full((BOUNDARIES, n, 2), value) for language, value in (("en", 1000.1), ("sw", 0.1))
    }
    space = estimate(data, batch=1, subspaces=False)
    assert torch.equal(space.mean[0], torch.tensor([[1000.1, 1000.1], [0.1, 0.1]]))
    assert space.bases == {}
    assert space.floors is None


def test_batch_means_count_every_batch_once() -> None:
    data = representations(n=7)
    space = estimate(data, batch=5, batch_means=True)
    for position, language in enumerate(space.languages):
        x = data[language].double()
        expected = (x[:, :5].mean(1) + x[:, 5:].mean(1)) / 2
        torch.testing.assert_close(space.mean[:, position], expected.float(), rtol=1e-6, atol=1e-7)


def test_ranks_are_equal_everywhere_unless_the_variance_decides() -> None:
    data = representations(n=N, d=D)
    ranks = {basis.shape[1] for basis in estimate(data).bases.values()}
    assert ranks == {N // 2 - 1}, "what the smaller half can have"
    assert {basis.shape[1] for basis in estimate(representations(n=80, d=40)).bases.values()} == {32}
    assert len({basis.shape[1] for basis in estimate(data, variance=0.8).bases.values()}) > 1
    with pytest.raises(ValueError, match=r"rank, variance: got 3 and 0\.8; wanted one of them at most"):
        estimate(data, rank=3, variance=0.8)


def test_only_the_given_boundaries_are_estimated() -> None:
    data = representations()
    accumulator = SpaceAccumulator(dict.fromkeys(data, N), "en", num_boundaries=BOUNDARIES, hidden_size=D)
    with accumulator.boundary_range([1]):
        for language, x in data.items():
            accumulator.update(
                language,
                range(N),
                x[[1]],
                square_norms=torch.ones(1),
                tokens=torch.tensor([4]),
                median_norms=torch.ones(1, N),
                sink_shares=torch.zeros(1, N),
            )
    space = accumulator.finish()
    assert space.boundaries == (1,)
    torch.testing.assert_close(space.shift_vectors(1), estimate(data).shift_vectors(1))
    with pytest.raises(ValueError, match=r"boundary: 0 was not estimated; this space has \[1\]"):
        space.shift_vectors(0)
    with pytest.raises(ValueError, match="boundary: 2 was not estimated"):
        space.noise_floor(2)


def test_a_copy_of_the_pivot_stays_at_the_noise_floor_and_another_language_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    n, d = 200, 32
    scales = 0.8 ** torch.arange(d)

    def draw(rotation: Tensor) -> Tensor:
        return (torch.randn(BOUNDARIES, n, d, generator=generator) * scales) @ rotation

    en, other = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for _ in range(2))
    # The cut at 90 % of the variance moves from draw to draw, so single figures scatter; their averages must not.
    figures = []
    for _ in range(8):
        space = estimate({"en": draw(en), "same": draw(en), "other": draw(other)}, batch=n)
        for k in range(BOUNDARIES):
            split = [space.split_distance(k, language) for language in ("same", "other")]
            whole = [space.distance(k, language, "en") for language in ("same", "other")]
            figures.append([space.noise_floor(k), *split, *whole])
    floor, split_same, split_other, same, other_ = torch.tensor(figures).mean(0).tolist()
    assert split_same == pytest.approx(floor, rel=0.1)
    assert split_other > 2 * floor
    # More sentences, less noise: the floor is an upper bound for distances from all sentences.
    assert same < 0.9 * floor
    assert other_ > 2 * floor
    assert min(row[2] / row[0] for row in figures) > 2


@pytest.mark.parametrize("n", [4, 5, 24, 101])
def test_halves_are_disjoint_complete_and_neither_contiguous_nor_periodic(n: int) -> None:
    first, second = split_halves(n)
    assert (len(first), len(second)) == ((n + 1) // 2, n // 2)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(n))
    assert all(torch.equal(a, b) for a, b in zip(split_halves(n), (first, second), strict=True))
    if n > 100:  # templates that repeat and texts that drift reach both halves alike
        for period in (2, 3, 4, 5):
            for phase in range(period):
                share = float((first % period == phase).sum()) / len(range(phase, n, period))
                assert share == pytest.approx(0.5, abs=0.3)
        assert float(first.double().mean()) == pytest.approx((n - 1) / 2, rel=0.2)


def test_two_or_three_sentences_give_distances_but_no_floor() -> None:
    space = estimate(representations(n=3))
    assert math.isfinite(space.distance(0, "en", "sw"))
    assert math.isnan(space.noise_floor(0))
    assert math.isnan(space.noise_floor(0, "sw"))
    assert math.isnan(space.split_distance(0, "sw"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": {"de": 5, "sw": 5}}, "pivot: 'en' has no sentences; found de, sw"),
        ({"sentences": {"en": 5}}, "got only 'en'"),
        ({"sentences": {"en": 5, "sw": 1}}, "'sw' has 1; wanted at least two"),
        ({"sentences": {"en": 5, "sw": 5}, "rank": -1}, "rank: got -1"),
    ],
)
def test_accumulator_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpaceAccumulator(pivot="en", num_boundaries=3, hidden_size=4, **arguments)  # type: ignore[arg-type]


def test_updates_are_checked() -> None:
    accumulator = SpaceAccumulator({"en": 3, "sw": 3}, "en", num_boundaries=2, hidden_size=4)
    good = {
        "square_norms": torch.ones(2),
        "tokens": torch.tensor([3, 3]),
        "median_norms": torch.ones(2, 3),
        "sink_shares": torch.zeros(2, 3),
    }
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="no range of boundaries is open"):
        accumulator.update("en", [0, 1, 2], x, **good)  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match="3 of 3 sentences of 'sw' were never given"),
        accumulator.boundary_range([0, 1]),
    ):
        with pytest.raises(ValueError, match="language: got 'xx'"):
            accumulator.update("xx", [0, 1, 2], x, **good)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"representations: got shape \(1, 3, 4\); wanted \(2, 3, 4\)"):
            accumulator.update("en", [0, 1, 2], x[:1], **good)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"tokens: got shape \(1,\); wanted \(2,\)"):
            accumulator.update("en", [0, 1, 2], x, **{**good, "tokens": torch.tensor([3])})
        with pytest.raises(ValueError, match=r"positions: got \[1, 2, 3\]; wanted indices in 0 … 2"):
            accumulator.update("en", [1, 2, 3], x, **good)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="given twice"):
            accumulator.update("en", [0, 1, 1], x, **good)  # type: ignore[arg-type]
        broken = x.clone()
        broken[1, 2, 3] = float("inf")
        with pytest.raises(ValueError, match=r"NaN or infinity in 'en' at boundaries \[1\]"):
            accumulator.update("en", [0, 1, 2], broken, **good)  # type: ignore[arg-type]
        accumulator.update("en", [0, 1, 2], x, **good)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="given twice"):
            accumulator.update("en", [0, 1, 2], x, **good)  # type: ignore[arg-type]
