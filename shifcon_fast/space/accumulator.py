"""Accumulates sentence representations into a language space, one range of boundaries at a time.

What is kept: O(d) per language and boundary for the means, and the n × d matrices of sentence representations only
for the boundaries of the range at hand. Everything lies on the CPU; sums are float64, so that neither the order nor
the size of the batches shows in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from shifcon_fast.space.language_router import fit_router
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.subspace import (
    Subspace,
    check_truncation,
    common_ridge,
    equal_rank,
    principal_subspaces,
    subspace_distances,
)

_Key = TypeVar("_Key")
_FLOAT32_BYTES = 4
_REDUCED_AT_ONCE = 2**23
"""Bytes of float64 representations, whose subspaces are fitted at once."""


class SpaceAccumulator:
    """Accumulates representations and turns them into a :class:`LanguageSpace`.

    Usage::

        accumulator = SpaceAccumulator({"en": 100, "sw": 100}, "en", num_boundaries=16, hidden_size=2048)
        for boundaries in accumulator.ranges(range(16), memory_bytes=2 << 30):
            with accumulator.boundary_range(boundaries):
                ...  # one pass over the sentences, accumulator.update(...) for each batch
        space = accumulator.finish(card)

    Args:
        sentences: number of sentences of each language, at least two; its order gives the language ids.
        pivot: code of the pivot language.
        num_boundaries: L, the number of decoder blocks.
        hidden_size: d.
        subspaces: whether to estimate subspaces and distances; without, no sentence matrices are kept.
        rank, variance: see :func:`~shifcon_fast.modeling.estimate_space.estimate_space`.
        batch_means: average the batches' means, each batch counting once, instead of the sentences (``official``).

    Raises:
        ValueError: fewer than two sentences or languages, a pivot without sentences, a bad ``rank`` or
            ``variance``.
    """

    def __init__(
        self,
        sentences: Mapping[str, int],
        pivot: str,
        *,
        num_boundaries: int,
        hidden_size: int,
        subspaces: bool = True,
        rank: int | None = None,
        variance: float | None = None,
        batch_means: bool = False,
    ) -> None:
        if rank is not None and variance is not None:
            raise ValueError(f"rank, variance: got {rank} and {variance}; wanted one of them at most")
        check_truncation(rank, 1.0 if variance is None else variance)
        if pivot not in sentences:
            raise ValueError(
                f"pivot: {pivot!r} has no sentences; found {', '.join(sentences) or 'no language'}"
            )
        if len(sentences) < 2:
            raise ValueError(
                f"sentences: got only {pivot!r}; wanted the pivot and at least one other language"
            )
        for language, count in sentences.items():
            if count < 2:
                raise ValueError(f"sentences: {language!r} has {count}; wanted at least two")
        self._languages = tuple(sentences)
        self._counts = dict(sentences)
        self._pivot = pivot
        self._hidden_size = hidden_size
        self._subspaces, self._variance = subspaces, variance
        self._rank = equal_rank(sentences.values()) if rank is None and variance is None else rank
        self._batch_means = batch_means

        shape = (num_boundaries, len(self._languages))
        nan = float("nan")
        self._mean = torch.full((*shape, hidden_size), nan)
        self._rms = torch.full((num_boundaries,), nan)
        self._sink_share = torch.full(shape, nan)
        self._median_norm = torch.full(shape, nan)
        self._ridge = torch.full((num_boundaries,), nan, dtype=torch.float64)
        self._floors = torch.full(shape, nan)
        self._split_distances = torch.full(shape, nan)
        routed = subspaces and not batch_means  # whose representations are those of the tokens as they run
        self._router_weight = torch.full((*shape, hidden_size), nan) if routed else None
        self._router_bias = torch.full(shape, nan) if routed else None
        self._bases: dict[tuple[int, str], Tensor] = {}
        self._variances: dict[tuple[int, str], Tensor] = {}
        self._covariances: dict[tuple[int, str], Tensor] = {}
        self._range: _RangeSums | None = None

    @property
    def rank(self) -> int | None:
        """Directions of every subspace; None where each has as many as hold ``variance``."""
        return self._rank

    def ranges(self, boundaries: Sequence[int], *, memory_bytes: float) -> list[list[int]]:
        """Split boundaries into ranges whose sentence matrices fit into ``memory_bytes``.

        At least one boundary each. The deepest range comes first, and each needs a pass only up to its last one.
        """
        ordered = sorted(boundaries, reverse=True)
        per_boundary = sum(self._counts.values()) * self._hidden_size * _FLOAT32_BYTES
        size = max(1, int(memory_bytes // per_boundary)) if self._subspaces else len(ordered)
        return [sorted(ordered[i : i + size]) for i in range(0, len(ordered), size)]

    @contextmanager
    def boundary_range(self, boundaries: Sequence[int]) -> Iterator[None]:
        """Accept updates for these boundaries; on leaving, reduce them and free their sentence matrices.

        Raises:
            ValueError: on leaving, when not every sentence of every language was given exactly once.
        """
        self._range = _RangeSums(
            boundaries, self._counts, self._hidden_size, self._subspaces, self._batch_means
        )
        try:
            yield
            self._reduce(self._range)
        finally:
            self._range = None

    def update(
        self,
        language: str,
        positions: Sequence[int],
        representations: Tensor,
        *,
        square_norms: Tensor,
        tokens: Tensor,
        median_norms: Tensor,
        sink_shares: Tensor,
    ) -> None:
        """Add one batch of n sentences of one language, at the b boundaries of the range.

        Args:
            language: its code.
            positions: (n,) indices of the sentences in the language's list, which decide their halves.
            representations: (b, n, d) float32.
            square_norms: (b,) float32 or float64, Σ‖h‖² over the batch's content tokens.
            tokens: (b,) integers, the number of those content tokens, which may differ between boundaries.
            median_norms: (b, n), median ‖h‖ of each sentence's content tokens.
            sink_shares: (b, n), see ``sink_share`` of :class:`LanguageSpace`.

        Raises:
            ValueError: no range is open, shapes do not fit, a sentence was given twice, values are not finite.
        """
        if self._range is None:
            raise ValueError(
                "update: no range of boundaries is open; call it inside `with accumulator.boundary_range(...)`"
            )
        if language not in self._counts:
            raise ValueError(f"language: got {language!r}; wanted one of {', '.join(self._languages)}")
        self._range.add(
            language,
            positions,
            representations=representations,
            square_norms=square_norms,
            tokens=tokens,
            median_norms=median_norms,
            sink_shares=sink_shares,
        )

    def finish(self, card: Mapping[str, Any] | None = None) -> LanguageSpace:
        """The language space of all ranges so far; boundaries that no range covered are NaN."""
        measured = self._subspaces
        return LanguageSpace(
            languages=self._languages,
            pivot=self._pivot,
            mean=self._mean,
            counts=self._counts,
            rms=self._rms,
            median_norm=self._median_norm,
            sink_share=self._sink_share,
            bases=self._bases,
            variances=self._variances,
            covariances=self._covariances,
            ridge=self._ridge if measured else None,
            floors=self._floors if measured else None,
            split_distances=self._split_distances if measured else None,
            router_weight=self._router_weight,
            router_bias=self._router_bias,
            card=dict(card or {}),
        )

    def _reduce(self, sums: _RangeSums) -> None:
        sums.check_complete()
        for i, boundary in enumerate(sums.boundaries):
            self._rms[boundary] = (sums.square_norms[i] / sums.tokens[i]).sqrt()
            for position, language in enumerate(self._languages):
                self._mean[boundary, position] = sums.totals[language][i] / sums.weights[language]
                count = self._counts[language]
                self._median_norm[boundary, position] = sums.median_norms[language][i] / count
                self._sink_share[boundary, position] = sums.sink_shares[language][i] / count
        per_boundary = sum(self._counts.values()) * self._hidden_size * 8
        step = max(1, _REDUCED_AT_ONCE // per_boundary)
        for start in range(0, len(sums.boundaries) if self._subspaces else 0, step):
            part = slice(start, start + step)
            matrices = {language: sums.matrices[language][part] for language in self._languages}
            self._reduce_subspaces(sums.boundaries[part], matrices)

    def _reduce_subspaces(self, boundaries: Sequence[int], matrices: Mapping[str, Tensor]) -> None:
        """Subspaces, ridge, floors and split distances of b boundaries from (b, n, d) representations."""
        halved = {language: x for language, x in matrices.items() if x.shape[1] >= 4}
        halves = {
            (language, which): x[:, half]
            for language, x in halved.items()
            for which, half in enumerate(split_halves(x.shape[1]))
        }
        subspaces, half_subspaces = self._fit(matrices), self._fit(halves)
        ridges: list[float] = []
        distances: list[tuple[tuple[str, int], tuple[str, int], int]] = []  # of two halves at a boundary
        for i, boundary in enumerate(boundaries):
            here = {language: each[i] for language, each in subspaces.items()}
            ridges.append(common_ridge(here.values()))
            self._ridge[boundary] = ridges[i]
            for language, subspace in here.items():
                self._bases[boundary, language] = subspace.basis.float()
                self._variances[boundary, language] = subspace.variances.float()
            rows = {language: x[i] for language, x in matrices.items()}
            covariances = _covariances(rows, here, self._pivot)
            self._covariances |= {(boundary, language): each for language, each in covariances.items()}
            if self._router_weight is not None and self._router_bias is not None:
                router = fit_router(list(rows.values()))
                self._router_weight[boundary], self._router_bias[boundary] = router.weight, router.bias
            for language in halved:
                distances.append(((language, 0), (language, 1), i))
                if language != self._pivot and self._pivot in halved:
                    distances += [((language, which), (self._pivot, 1 - which), i) for which in (0, 1)]

        pairs = [(half_subspaces[first][i], half_subspaces[second][i]) for first, second, i in distances]
        found = dict(
            zip(distances, subspace_distances(pairs, [ridges[i] for *_, i in distances]), strict=True)
        )
        for i, boundary in enumerate(boundaries):
            for position, language in enumerate(self._languages):
                if language == self._pivot:
                    self._split_distances[boundary, position] = 0.0
                if language not in halved:
                    continue
                self._floors[boundary, position] = found[(language, 0), (language, 1), i]
                if language != self._pivot and self._pivot in halved:
                    crossed = (found[(language, which), (self._pivot, 1 - which), i] for which in (0, 1))
                    self._split_distances[boundary, position] = sum(crossed) / 2

    def _fit(self, matrices: Mapping[_Key, Tensor]) -> dict[_Key, list[Subspace]]:
        """The subspaces of (b, n, d) representations, b of each; those of as many sentences at once."""
        alike: dict[int, list[_Key]] = {}
        for key, x in matrices.items():
            alike.setdefault(x.shape[1], []).append(key)
        found: dict[_Key, list[Subspace]] = {}
        for keys in alike.values():
            x = torch.cat([matrices[key] for key in keys])
            fitted = iter(principal_subspaces(x, rank=self._rank, variance=self._variance or 1.0))
            found |= {key: [next(fitted) for _ in matrices[key]] for key in keys}
        return found


def _covariances(
    matrices: Mapping[str, Tensor], subspaces: Mapping[str, Subspace], pivot: str
) -> dict[str, Tensor]:
    """language → (k_pivot, k) float32, of the coordinates of translations; of languages that are aligned."""
    coordinates = {
        language: (x.double() - subspaces[language].mean) @ subspaces[language].basis
        for language, x in matrices.items()
    }
    of_pivot = coordinates.pop(pivot)
    return {
        language: (of_pivot.T @ own / (len(own) - 1)).float()
        for language, own in coordinates.items()
        if len(own) == len(of_pivot)
    }


def split_halves(n: int) -> tuple[Tensor, Tensor]:
    """Positions of two disjoint halves of n sentences, (n+1)//2 and n//2 of them, the same in every run.

    Drawn at random, once and for all: corpora drift from front to back, and templates repeat with a period.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    first, second = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    return first.sort().values, second.sort().values


class _RangeSums:
    """The sums and the sentence matrices of one range of boundaries."""

    def __init__(
        self, boundaries: Sequence[int], counts: Mapping[str, int], d: int, matrices: bool, batch_means: bool
    ) -> None:
        self.boundaries = list(boundaries)
        b = len(self.boundaries)
        self.totals = {language: torch.zeros(b, d, dtype=torch.float64) for language in counts}
        self.weights = dict.fromkeys(counts, 0)
        self.square_norms = torch.zeros(b, dtype=torch.float64)
        self.tokens = torch.zeros(b, dtype=torch.int64)
        self.median_norms = {language: torch.zeros(b, dtype=torch.float64) for language in counts}
        self.sink_shares = {language: torch.zeros(b, dtype=torch.float64) for language in counts}
        self.matrices = {language: torch.empty(b, n, d) for language, n in counts.items()} if matrices else {}
        self._seen = {language: torch.zeros(n, dtype=torch.bool) for language, n in counts.items()}
        self._batch_means = batch_means

    def add(
        self,
        language: str,
        positions: Sequence[int],
        *,
        representations: Tensor,
        square_norms: Tensor,
        tokens: Tensor,
        median_norms: Tensor,
        sink_shares: Tensor,
    ) -> None:
        d = self.totals[language].shape[1]
        b, n = len(self.boundaries), len(positions)
        for name, value, shape in (
            ("representations", representations, (b, n, d)),
            ("square_norms", square_norms, (b,)),
            ("tokens", tokens, (b,)),
            ("median_norms", median_norms, (b, n)),
            ("sink_shares", sink_shares, (b, n)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}; wanted {shape}")
        seen, index = self._seen[language], torch.as_tensor(positions, dtype=torch.long)
        if n == 0 or int(index.min()) < 0 or int(index.max()) >= seen.numel():
            raise ValueError(f"positions: got {list(positions)}; wanted indices in 0 … {seen.numel() - 1}")
        if seen[index].any() or index.unique().numel() != n:
            raise ValueError(f"positions: a sentence of {language!r} was given twice among {list(positions)}")
        x = representations.detach().to(device="cpu", dtype=torch.float32)
        if not torch.isfinite(x).all():
            broken = [k for k, h in zip(self.boundaries, x, strict=True) if not torch.isfinite(h).all()]
            raise ValueError(
                f"representations: NaN or infinity in {language!r} at boundaries {broken}; the hidden states "
                "overflow (float16? load the model in bfloat16 or float32) or the weights are broken"
            )
        seen[index] = True
        if self._batch_means:
            self.totals[language] += x.double().mean(1)
            self.weights[language] += 1
        else:
            self.totals[language] += x.sum(1, dtype=torch.float64)
            self.weights[language] += n
        self.square_norms += square_norms.detach().to(device="cpu", dtype=torch.float64)
        self.tokens += tokens.to("cpu")
        self.median_norms[language] += median_norms.detach().to(device="cpu", dtype=torch.float64).sum(1)
        self.sink_shares[language] += sink_shares.detach().to(device="cpu", dtype=torch.float64).sum(1)
        if self.matrices:
            self.matrices[language][:, index] = x

    def check_complete(self) -> None:
        for language, seen in self._seen.items():
            if not seen.all():
                raise ValueError(
                    f"boundary_range: {int((~seen).sum())} of {seen.numel()} sentences of {language!r} were never "
                    "given; every range needs a full pass over the sentences"
                )
