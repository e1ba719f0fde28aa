"""The language space: what is known about every language at every boundary of one model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shifcon_fast.data.languages import position_of
from shifcon_fast.space import space_folder, sweep_result
from shifcon_fast.space.intervention import (
    MAPS,
    FittedSubspaces,
    InterventionName,
    check_fitted,
    check_intervention,
    fit_maps,
    random_directions,
)
from shifcon_fast.space.language_router import LanguageRouter
from shifcon_fast.space.language_shift import LanguageShift, Recipe, check_area
from shifcon_fast.space.subspace import Subspace, subspace_distance
from shifcon_fast.space.sweep_result import AreaSweep

_ORIGIN = ("model", "tokenizer", "versions", "recipe", "max_length")  # of a space's card, and of its shifts


@dataclass(eq=False)
class LanguageSpace:
    """Language vectors and subspaces of K languages at the boundaries of a model with hidden size d.

    Boundary k is the residual stream *entering* block k: a model with L blocks has boundaries 0 … L−1.

    Attributes:
        languages: codes; the position of a code is its language id.
        pivot: the code of the pivot language.
        mean: (L, K, d) float32, language vectors v(l, k). NaN at boundaries that were not estimated.
        counts: sentences per language.
        rms: (L,) float32, √(mean ‖h‖²) over the content tokens of all languages.
        median_norm: (L, K) float32, median ‖h‖ of a sentence's content tokens, averaged over sentences.
        sink_share: (L, K) float32, what a mean over all attended tokens would owe to those that are not content,
            averaged over sentences: ‖Σ h left out‖ / (‖Σ h left out‖ + ‖Σ h content‖).
        bases: (boundary, language) → (d, k) float32 orthonormal columns. Empty where subspaces were not asked for.
        variances: (boundary, language) → (k,) float32, s²/(n−1) along each column.
        covariances: (boundary, language) → (k_pivot, k) float32, Σ V_pᵀ(p − v(p)) (V_lᵀ(x − v(l)))ᵀ/(n−1) over
            translations (p, x): how the pivot's coordinates vary with the language's. Without the pivot.
        ridge: (L,) float64, ε of the subspace distance at each boundary.
        floors: (L, K) float32, distance between two halves of the same language.
        split_distances: (L, K) float32, distance of a language to the pivot between such halves.
        router_weight, router_bias: (L, K, d) and (L, K) float32, which language a text is in, from its
            representation (:class:`.LanguageRouter`); None for the official recipe, whose representations differ.
        card: JSON-able: "model" (its fingerprint), "tokenizer", "versions", "recipe", "rank", "variance".
        sweep: what the shift does at candidate areas, where that was measured; ``recommend_area`` goes by it.
    """

    languages: tuple[str, ...]
    pivot: str
    mean: Tensor
    counts: dict[str, int]
    rms: Tensor
    median_norm: Tensor
    sink_share: Tensor
    bases: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)
    variances: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)
    covariances: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)
    ridge: Tensor | None = None
    floors: Tensor | None = None
    split_distances: Tensor | None = None
    router_weight: Tensor | None = None
    router_bias: Tensor | None = None
    card: dict[str, Any] = field(default_factory=dict, repr=False)
    sweep: AreaSweep | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.languages = tuple(self.languages)
        if len(set(self.languages)) != len(self.languages):
            raise ValueError(f"languages: got {list(self.languages)}; wanted every code once")
        if self.pivot not in self.languages:
            raise ValueError(f"pivot: got {self.pivot!r}; wanted one of {list(self.languages)}")
        if self.mean.dim() != 3 or self.mean.shape[1] != len(self.languages):
            raise ValueError(
                f"mean: got shape {tuple(self.mean.shape)}; wanted (boundaries, {len(self.languages)} languages, d)"
            )
        self.mean = self.mean.detach().to(device="cpu", dtype=torch.float32)
        boundaries, k, d = self.mean.shape
        wanted = {
            "rms": (boundaries,),
            "median_norm": (boundaries, k),
            "sink_share": (boundaries, k),
            "ridge": (boundaries,),
            "floors": (boundaries, k),
            "split_distances": (boundaries, k),
            "router_weight": (boundaries, k, d),
            "router_bias": (boundaries, k),
        }
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}; wanted {shape}")
        if self.counts.keys() != set(self.languages):
            raise ValueError(
                f"counts: got {list(self.counts)}; wanted a number of sentences for each language"
            )
        if self.bases.keys() != self.variances.keys():
            raise ValueError("variances: must hold the same (boundary, language) pairs as bases")
        for key, basis in self.bases.items():
            if not 0 <= key[0] < boundaries or key[1] not in self.languages:
                raise ValueError(
                    f"bases: got {key}; wanted a boundary below {boundaries} and a known language"
                )
            rank = self.variances[key].numel()
            if tuple(basis.shape) != (d, rank):
                raise ValueError(f"bases[{key}]: got shape {tuple(basis.shape)}; wanted {(d, rank)}")
        for key, covariance in self.covariances.items():
            if not {key, (key[0], self.pivot)} <= self.bases.keys():
                raise ValueError(f"covariances: got {key}; wanted one with a basis, and one of the pivot's")
            ranks = tuple(self.bases[key[0], code].shape[1] for code in (self.pivot, key[1]))
            if tuple(covariance.shape) != ranks:
                raise ValueError(f"covariances[{key}]: got shape {tuple(covariance.shape)}; wanted {ranks}")

    @property
    def num_boundaries(self) -> int:
        """L, the number of decoder blocks: boundaries are 0 … L−1."""
        return self.mean.shape[0]

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return self.mean.shape[2]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The boundaries that were estimated."""
        return tuple(torch.isfinite(self.mean).all(dim=(1, 2)).nonzero().flatten().tolist())

    @property
    def vectors_sha256(self) -> str:
        """SHA-256 of the language vectors with their languages and pivot: all that the shift depends on."""
        digest = hashlib.sha256("\n".join([self.pivot, *self.languages]).encode())
        digest.update(self.mean.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def language_id(self, language: str) -> int:
        """Position of a language's code, in whatever form (``swh_Latn`` for ``sw``).

        Raises:
            ValueError: a language that is not one of the space's; the known codes are listed.
        """
        return position_of(language, self.languages)

    def shift(
        self,
        forward: int,
        backward: int,
        alpha: float | Mapping[str, float] = 1.0,
        recipe: Recipe = "stable",
        *,
        intervention: InterventionName = "mean",
        targets: Sequence[str] = (),
        seed: int = 0,
    ) -> LanguageShift:
        """What an area's shift needs of this space: the language vectors at ``forward`` and ``backward``.

        Args:
            forward, backward: boundaries f < b, each in 0 … L−1 (1 … L−1 for ``recipe="official"``).
            alpha, recipe: see :class:`LanguageShift`. α by language, ``{"sw": 0.5}``: languages left out have 1.
            intervention: the way to move hidden states, see :mod:`shifcon_fast.space.intervention`.
            targets: languages whose barycentre is moved to instead of the pivot; empty for the pivot.
            seed: of the directions of "random".

        Raises:
            ValueError: boundaries out of order or range, or not estimated; an alpha that is not finite; an
                intervention that this space cannot give: it holds no subspaces, or of rank 0.
        """
        check_area(forward, backward, self.num_boundaries, recipe)
        check_intervention(intervention)
        area = (forward, backward)
        for boundary in area:
            self._estimated(boundary)
        parts: dict[str, Any] = {}
        if isinstance(alpha, Mapping):
            parts["alphas"] = self._alphas(alpha)
        if intervention == "random":
            parts["directions"] = random_directions(len(self.languages), self.hidden_size, seed)
        elif intervention in MAPS:
            parts |= fit_maps(
                [self._fitted(boundary, intervention) for boundary in area], self.pivot, intervention
            )
        return LanguageShift(
            self.languages,
            self.pivot,
            forward,
            backward,
            self.mean[list(area)],
            self.median_norm[list(area)],
            self.num_boundaries,
            1.0 if isinstance(alpha, Mapping) else float(alpha),
            recipe,
            provenance={
                **{name: self.card[name] for name in _ORIGIN if name in self.card},
                "sentences": self.counts,
                "vectors_sha256": self.vectors_sha256,
            },
            router=self._router(forward) if recipe == "stable" else None,
            intervention=intervention,
            targets=self.find_targets(targets),
            **parts,
        )

    def _alphas(self, given: Mapping[str, float]) -> Tensor:
        """(K,), α of each language; 1 where none is given."""
        found = torch.ones(len(self.languages))
        for code, value in given.items():
            try:
                found[self.language_id(code)] = float(value)
            except ValueError as error:
                raise ValueError(f"alpha: {error}") from error
        return found

    def check_gives(self, intervention: InterventionName, boundaries: Iterable[int]) -> None:
        """Refuse what :meth:`shift` would, before a model is loaded or anything is measured.

        Raises:
            ValueError: an intervention that this space cannot give at one of these boundaries.
        """
        check_intervention(intervention)
        for boundary in sorted(set(boundaries)) if intervention in MAPS else ():
            check_fitted(self._fitted(boundary, intervention), self.pivot, intervention)

    def find_targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Languages to shift to, as this space writes them.

        Raises:
            ValueError: one that it does not know, or that is there twice.
        """
        try:
            found = tuple(self.languages[self.language_id(code)] for code in targets)
        except ValueError as error:
            raise ValueError(f"targets: {error}") from error
        if len(set(found)) < len(found):
            raise ValueError(f"targets: got {list(targets)}; wanted every language once")
        return found

    def _fitted(self, boundary: int, intervention: str) -> FittedSubspaces:
        if not any(at == self._estimated(boundary) for at, _ in self.bases):
            raise ValueError(
                f"intervention: {intervention!r} moves along subspaces, and there are no subspaces at boundary "
                f"{boundary}: this space was estimated without. Estimate it again, with subspaces, at the area's "
                "boundaries (shifcon profile)"
            )
        subspaces = {code: self.subspace(boundary, code) for code in self.languages}
        covariances = {code: each for (at, code), each in self.covariances.items() if at == boundary}
        return FittedSubspaces(subspaces, covariances, float(self._measured("ridge", boundary)))

    def _router(self, boundary: int) -> LanguageRouter | None:
        if self.router_weight is None or self.router_bias is None:
            return None
        return LanguageRouter(self.router_weight[boundary], self.router_bias[boundary])

    def shift_vectors(self, boundary: int) -> Tensor:
        """(K, d) float32: v(pivot) − v(l) at a boundary, the shift toward; exactly 0 for the pivot."""
        mean = self.mean[self._estimated(boundary)]
        return mean[self.language_id(self.pivot)] - mean

    def subspace(self, boundary: int, language: str) -> Subspace:
        """A language's affine subspace at a boundary."""
        position = self.language_id(language)
        key = (self._estimated(boundary), self.languages[position])
        if key not in self.bases:
            raise ValueError(
                f"boundary: no subspaces at boundary {boundary}; this space was estimated with subspaces=False"
            )
        return Subspace(self.mean[boundary, position], self.bases[key], self.variances[key])

    def distance(self, boundary: int, a: str, b: str) -> float:
        """Subspace distance D(a, b) at a boundary, from all sentences (see ``subspace_distance``).

        The noise floor is taken at half as many sentences: compare ``split_distance`` to it.
        """
        first, second = self.subspace(boundary, a), self.subspace(boundary, b)
        if self.language_id(a) == self.language_id(b):
            return 0.0
        assert self.ridge is not None  # estimated with the subspaces
        return subspace_distance(first, second, float(self.ridge[boundary]))

    def split_distance(self, boundary: int, language: str) -> float:
        """Distance to the pivot between disjoint halves of the sentences: one half of each language.

        Averaged over the two ways of pairing. It differs from the noise floor in nothing but the language, so a
        language whose ``split_distance`` is not above ``noise_floor`` cannot be told from the pivot by its shape.
        NaN with fewer than four sentences; 0 for the pivot.
        """
        return float(self._measured("split_distances", boundary)[self.language_id(language)])

    def noise_floor(self, boundary: int, language: str | None = None) -> float:
        """Distance between two random halves of one language's sentences; without one, the languages' mean.

        Halves hold n/2 sentences, and sampling noise shrinks with n, so for ``distance`` (n sentences) it is an
        upper bound of what noise alone gives. NaN with fewer than four sentences.
        """
        floors = self._measured("floors", boundary)
        return float(floors.nanmean() if language is None else floors[self.language_id(language)])

    def excess_distance(self, boundary: int, language: str) -> float:
        """``split_distance / noise_floor − 1``: how far above noise a language lies from the pivot; 0 is noise.

        On real models it hardly depends on the rank, which the distance itself grows with (docs/method.md): it is
        what compares between boundaries. NaN with fewer than four sentences.
        """
        floor = self.noise_floor(boundary, language)
        split = self.split_distance(boundary, language)
        return split / floor - 1 if floor > 0 else (0.0 if split == floor else math.inf)

    def mean_gap(self, boundary: int, language: str) -> float:
        """‖v(language) − v(pivot)‖ / rms‖h‖ at a boundary, h of all languages: comparable between languages."""
        shift = self.shift_vectors(boundary)[self.language_id(language)]
        return float(shift.double().norm() / self.rms[boundary].double())

    def dose(self, boundary: int, language: str, alpha: float = 1.0) -> float:
        """‖α (v(pivot) − v(language))‖ / median ‖h‖ of the language: how much of a hidden state the shift replaces.

        Generation is known to collapse from about 1 on (docs/method.md).
        """
        position = self.language_id(language)
        shift = self.shift_vectors(boundary)[position]
        return abs(alpha) * float(shift.double().norm() / self.median_norm[boundary, position].double())

    def replace_means(self, mean: Tensor) -> LanguageSpace:
        """A new space with other language vectors (L, K, d); everything else is shared with this one.

        Raises:
            ValueError: ``mean`` has another shape.
        """
        if mean.shape != self.mean.shape:
            raise ValueError(f"mean: got shape {tuple(mean.shape)}; wanted {tuple(self.mean.shape)}")
        mean = mean.detach().to(device="cpu", dtype=torch.float32, copy=True)
        return replace(self, mean=mean, sweep=None)  # a sweep is of the vectors that it was made with

    def save(self, folder: str | Path) -> None:
        """Write ``language_space.safetensors`` and ``language_space.json`` into a folder, both or neither."""
        tensors = {name: getattr(self, name) for name in space_folder.REQUIRED_TENSORS}
        for name in space_folder.OPTIONAL_TENSORS:
            if (value := getattr(self, name)) is not None:
                tensors[name] = value
        for kind, held in self._by_boundary().items():
            tensors |= {f"{kind}.{boundary}.{language}": each for (boundary, language), each in held.items()}
        description = {
            "languages": list(self.languages),
            "pivot": self.pivot,
            "num_boundaries": self.num_boundaries,
            "hidden_size": self.hidden_size,
            "boundaries": list(self.boundaries),
            "sentences": self.counts,
            "sink_share": self._by_language(
                lambda k, language: float(self.sink_share[k, self.language_id(language)])
            ),
            "dose": self._by_language(self.dose),
        }
        space_folder.write(Path(folder), tensors, description, self.card)

    def _by_boundary(self) -> dict[str, dict[tuple[int, str], Tensor]]:
        """Name in the file → what is held for some boundaries and languages."""
        return {"basis": self.bases, "variances": self.variances, "covariances": self.covariances}

    @classmethod
    def load(cls, folder: str | Path) -> LanguageSpace:
        """Read a folder that ``save`` wrote, with the sweep that lies beside it, if one does.

        Raises:
            ValueError: not a language space, a format of a newer version, missing or misshapen tensors, or a file
                damaged since it was written; the message names the file.
        """
        folder = Path(folder)
        tensors, card = space_folder.read(folder)
        try:
            space = cls._from_parts(tensors, card)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{folder / space_folder.CARD}: the language space is damaged: {error}"
            ) from error
        if (folder / sweep_result.FILE_NAME).is_file():
            space.sweep = AreaSweep.load(folder)
        return space

    @classmethod
    def _from_parts(cls, tensors: Mapping[str, Tensor], card: space_folder.SpaceCard) -> LanguageSpace:
        held: dict[str, dict[tuple[int, str], Tensor]] = {"basis": {}, "variances": {}, "covariances": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind in held and rest:
                boundary, _, language = rest.partition(".")
                held[kind][int(boundary), language] = tensor
        bases = held["basis"]
        required = (*space_folder.REQUIRED_TENSORS, *(("ridge",) if bases else ()))
        if missing := [name for name in required if name not in tensors]:
            raise ValueError(f"{space_folder.TENSORS} lacks {', '.join(map(repr, missing))}")
        space = cls(
            languages=tuple(card["languages"]),
            pivot=card["pivot"],
            mean=tensors["mean"],
            counts=card["sentences"],
            rms=tensors["rms"],
            median_norm=tensors["median_norm"],
            sink_share=tensors["sink_share"],
            bases=bases,
            variances=held["variances"],
            covariances=held["covariances"],
            **{name: tensors.get(name) for name in space_folder.OPTIONAL_TENSORS},  # type: ignore[arg-type]
            card=dict(card["card"]),
        )
        recorded = (card["num_boundaries"], card["hidden_size"])
        if recorded != (space.num_boundaries, space.hidden_size):
            raise ValueError(
                f"the card says {recorded[0]} boundaries of hidden size {recorded[1]}, the tensors hold "
                f"{space.num_boundaries} of {space.hidden_size}; the two files do not belong together"
            )
        return space

    def _by_language(self, measure: Callable[[int, str], float]) -> dict[str, list[float | None]]:
        """Language → a measure at every boundary, for people who read the card; None where not estimated."""
        known = set(self.boundaries)
        return {
            language: [
                round(measure(k, language), 4) if k in known else None for k in range(self.num_boundaries)
            ]
            for language in self.languages
        }

    def _estimated(self, boundary: int) -> int:
        if not 0 <= boundary < self.num_boundaries:
            raise ValueError(
                f"boundary: got {boundary}; this space has boundaries 0 … {self.num_boundaries - 1}"
            )
        if not torch.isfinite(self.mean[boundary]).all():
            raise ValueError(
                f"boundary: {boundary} was not estimated; this space has {list(self.boundaries)}"
            )
        return boundary

    def _measured(self, name: str, boundary: int) -> Tensor:
        value: Tensor | None = getattr(self, name)
        self._estimated(boundary)
        if value is None:
            raise ValueError(
                "boundary: no distances were measured; this space was estimated with subspaces=False"
            )
        return value[boundary]
