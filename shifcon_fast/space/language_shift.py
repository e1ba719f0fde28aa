"""The language vectors at the two boundaries of a layer area: all of a language space that a shift needs.

A shift moves hidden states by one of the ways of ``space.intervention``; the mean shift is ShifCon's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from shifcon_fast.data.languages import position_of
from shifcon_fast.space.intervention import (
    MAPS,
    InterventionName,
    MapTables,
    ProjectionTables,
    check_intervention,
)
from shifcon_fast.space.language_router import LanguageRouter

Recipe = Literal["stable", "official"]

_NEXT_TO_NOTHING = 0.01  # of a hidden state; bfloat16 rounds numbers by up to 0.004 of themselves


@dataclass(frozen=True, eq=False)
class LanguageShift:
    """The shift of K languages toward the pivot at one boundary and back at a later one.

    At boundary f, h ← h + α (v(pivot, f) − v(language, f)); at boundary b, the same with the sign turned round
    (ShifCon, arXiv 2410.19453). ``LanguageSpace.shift`` makes one, and a run folder holds one.

    Attributes:
        languages: codes; the position of a code is its language id.
        pivot: the code of the pivot language.
        forward, backward: boundaries f < b.
        vectors: (2, K, d) float32, the language vectors at f and b.
        median_norm: (2, K) float32, median ‖h‖ of the languages' content tokens at f and b.
        num_boundaries: L, one for each block of the model.
        alpha: length of the shift, in language vector differences; finite.
        alphas: (K,) float32, finite: each language's own factor of ``alpha``, as ``learn_alpha`` finds them; None
            is 1 for all.
        recipe: ``"stable"`` adds the vectors of boundary k at boundary k. ``"official"`` adds those of boundaries
            f and b at f−1 and b−1, as the authors' code does.
        provenance: JSON-able: where the vectors are from. ``model`` (with its ``fingerprint``), ``tokenizer``
            (with its ``special_ids``), ``sentences`` (language → count) and ``max_length`` are used again; the rest
            is for readers.
        router: tells which language a text is in, from its representation at f; None where none was estimated.
        intervention: the way to move hidden states, see ``space.intervention``.
        targets: the languages whose mean vector is moved to: the pivot, or several, whose barycentre then takes its
            place and to which the pivot's own rows move too. Empty is the pivot.
        directions: (K, d) float32 unit vectors of the intervention "random"; None for others.
        bases: (2, K, d, k) float32, the subspaces' orthonormal columns at f and b, for "subspace", "affine" and
            "procrustes"; None for others.
        links: (2, K, k, k) float32, M of "affine" and "procrustes" at f (from each language's coordinates to the
            pivot's) and b (back); None for others.
        spread: (2, K) float32, how far sentences are moved beside their language's mean, root mean square, where a
            map moves each in another way; None is 0.

    Raises:
        ValueError, TypeError: languages twice, a pivot or targets that are none of them, boundaries out of order or
            range, an alpha that is not finite, an unknown intervention or one without its tensors, tensors of other
            shapes.
    """

    languages: tuple[str, ...]
    pivot: str
    forward: int
    backward: int
    vectors: Tensor
    median_norm: Tensor
    num_boundaries: int
    alpha: float = 1.0
    recipe: Recipe = "stable"
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    router: LanguageRouter | None = field(default=None, repr=False)
    intervention: InterventionName = "mean"
    targets: tuple[str, ...] = ()
    directions: Tensor | None = field(default=None, repr=False)
    bases: Tensor | None = field(default=None, repr=False)
    links: Tensor | None = field(default=None, repr=False)
    spread: Tensor | None = field(default=None, repr=False)
    alphas: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(set(self.languages)) != len(self.languages):
            raise ValueError(f"languages: got {list(self.languages)}; wanted every code once")
        if self.pivot not in self.languages:
            raise ValueError(f"pivot: got {self.pivot!r}; wanted one of {list(self.languages)}")
        check_area(self.forward, self.backward, self.num_boundaries, self.recipe)
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha: got {self.alpha}, wanted a finite number.")
        count = len(self.languages)
        if self.alphas is not None and (self.alphas.shape != (count,) or not self.alphas.isfinite().all()):
            raise ValueError(
                f"alphas: got {self.alphas.tolist()}; wanted {count} finite numbers, one per language"
            )
        if self.vectors.dim() != 3 or self.vectors.shape[:2] != (2, count):
            raise ValueError(
                f"vectors: got shape {tuple(self.vectors.shape)}; wanted (2, {count} languages, d)"
            )
        if self.router is not None and self.router.weight.shape != self.vectors.shape[1:]:
            raise ValueError(
                f"router: got weight {tuple(self.router.weight.shape)}; wanted {tuple(self.vectors.shape[1:])}"
            )
        if self.median_norm.shape != (2, count):
            raise ValueError(
                f"median_norm: got shape {tuple(self.median_norm.shape)}; wanted (2, {count} languages)"
            )
        self._check_intervention()

    def _check_intervention(self) -> None:
        check_intervention(self.intervention)
        if unknown := [code for code in self.targets if code not in self.languages]:
            raise ValueError(f"targets: got {unknown}; wanted some of {list(self.languages)}")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets: got {list(self.targets)}; wanted every language once")
        if self.targets and self.intervention not in ("mean", "random"):
            raise ValueError(
                f"targets: got {list(self.targets)}; intervention {self.intervention!r} moves to no barycentre: "
                "wanted 'mean' or 'random', or no targets"
            )
        if self.is_map and self.recipe == "official":
            raise ValueError(
                f"intervention: got {self.intervention!r} with recipe 'official', whose unit vectors have no "
                "subspaces; wanted recipe 'stable'"
            )
        count, d = self.vectors.shape[1:]
        k = -1 if self.bases is None else self.bases.shape[-1]
        wanted = {
            "directions": (count, d) if self.intervention == "random" else None,
            "bases": (2, count, d, k) if self.is_map else None,
            "links": (2, count, k, k) if self.intervention in ("affine", "procrustes") else None,
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if (None if tensor is None else tuple(tensor.shape)) != shape:
                found = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"{name}: got {found}; wanted {shape or 'none'} for intervention {self.intervention!r}"
                )

    @property
    def is_map(self) -> bool:
        """Whether each hidden state is moved in a way of its own, not all of a language by one vector."""
        return self.intervention in MAPS

    @property
    def moves_pivot(self) -> bool:
        """Whether the pivot's rows move too: all languages meet elsewhere than at the pivot."""
        return self.intervention == "centre" or self.targets not in ((), (self.pivot,))

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return self.vectors.shape[2]

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks at whose input is added: f and b, or f−1 and b−1 of the official recipe."""
        earlier = 1 if self.recipe == "official" else 0
        return self.forward - earlier, self.backward - earlier

    @property
    def pivot_id(self) -> int:
        """Position of the pivot."""
        return self.languages.index(self.pivot)

    def language_id(self, language: str) -> int:
        """Position of a language's code, in whatever form (``swh_Latn`` for ``sw``).

        Raises:
            ValueError: a language that is not one of these; the known codes are listed.
        """
        if language in self.languages:  # what torch.compile can trace
            return self.languages.index(language)
        return position_of(language, self.languages)

    def alpha_of(self, language: str) -> float:
        """α of a language: the shift's, times the language's own factor where there is one.

        Raises:
            ValueError: a language that is not one of these; the known codes are listed.
        """
        own = 1.0 if self.alphas is None else float(self.alphas[self.language_id(language)])
        return self.alpha * own

    @property
    def alphas_by_language(self) -> dict[str, float]:
        """Language → its own factor of alpha; empty where none has one."""
        return {} if self.alphas is None else dict(zip(self.languages, self.alphas.tolist(), strict=True))

    def _scaled(self, displacement: Tensor) -> Tensor:
        """(K, d, ...) times α of each language."""
        if self.alphas is None:
            return self.alpha * displacement
        alphas = (self.alpha * self.alphas).to(displacement.device)
        return alphas.reshape(-1, *[1] * (displacement.dim() - 1)) * displacement

    def _toward(self) -> Tensor:
        """(2, K, d), from each language's mean to where it is moved at f and, turned round, at b; without alpha."""
        if self.intervention == "centre":
            return -self.vectors
        rows = [self.languages.index(code) for code in self.targets] or [self.pivot_id]
        toward = self.vectors[:, rows].mean(1, keepdim=True) - self.vectors
        if self.directions is None:
            return toward
        return torch.linalg.vector_norm(toward, dim=-1, keepdim=True) * self.directions

    def tables(self) -> dict[int, Tensor]:
        """block → (K, d) float32, what is added at its input: ±α (v(pivot) − v(l)), exactly 0 for the pivot.

        For other interventions than the mean shift, what they add instead; of maps, see :meth:`maps`, the constant.
        """
        toward = self._toward()
        first, second = self.blocks
        return {first: self._scaled(toward[0]), second: -self._scaled(toward[1])}

    def maps(self) -> dict[int, ProjectionTables | MapTables]:
        """block → how its input is moved, for interventions that are maps; empty for others."""
        if self.bases is None:
            return {}
        return dict(zip(self.blocks, (self._map(True), self._map(False)), strict=True))

    def _map(self, toward: bool) -> ProjectionTables | MapTables:
        assert self.bases is not None
        at = 0 if toward else 1
        mean, basis, pivot = self.vectors[at], self.bases[at], self.pivot_id
        if self.links is None:
            alpha = self.alpha if self.alphas is None else self.alpha * self.alphas
            return ProjectionTables(mean, basis, pivot, toward, alpha)
        own, other = (basis, basis[pivot].expand_as(basis))
        start, end = (own, other) if toward else (other, own)
        source = mean if toward else mean[pivot].expand_as(mean)
        left = self._scaled(end @ self.links[at] - start)
        return MapTables(self.tables()[self.blocks[at]], source.contiguous(), left, start.contiguous())

    def dose(self, language: str) -> tuple[float, float]:
        """How far the language's sentences are moved at f and at b, against median ‖h‖.

        ‖α (v(pivot) − v(language))‖ / median ‖h‖ for the mean shift. A map moves each sentence in its own way: then
        the root mean square over sentences.
        """
        position = self.language_id(language)
        squares = self._toward()[:, position].double().square().sum(-1)
        if self.spread is not None:
            squares = squares + self.spread[:, position].double().square()
        alpha = abs(self.alpha_of(language))
        at_f, at_b = (alpha * squares.sqrt() / self.median_norm[:, position].double()).tolist()
        return at_f, at_b


def dose_warning(shift: LanguageShift) -> str | None:
    """A sentence on languages whose dose is above 1, one on those that are hardly shifted; None without either.

    What is left alone on purpose, the pivot and a language whose alpha is 0, is not hardly shifted.
    """
    doses = {language: shift.dose(language) for language in shift.languages}
    return " ".join(filter(None, (_too_long(shift, doses), _too_short(shift, doses)))) or None


def _too_long(shift: LanguageShift, doses: Mapping[str, tuple[float, float]]) -> str:
    high = [
        (dose, language, boundary)
        for language, both in doses.items()
        for dose, boundary in zip(both, (shift.forward, shift.backward), strict=True)
        if dose > 1
    ]
    if not high:
        return ""
    dose, language, boundary = max(high)
    affected = list(dict.fromkeys(each[1] for each in high))
    return (
        f"The shift of {', '.join(affected)} is longer than a hidden state (alpha = "
        f"{shift.alpha_of(language):g}; {language} at boundary {boundary}: {dose:.1f} times the median norm). "
        "Answers are known to collapse above 1: lower alpha, or take another area."
    )


def _too_short(shift: LanguageShift, doses: Mapping[str, tuple[float, float]]) -> str:
    low = {
        language: max(both)
        for language, both in doses.items()
        if language != shift.pivot and shift.alpha_of(language) != 0 and max(both) < _NEXT_TO_NOTHING
    }
    if not low:
        return ""
    longest = max(low, key=lambda language: low[language])
    cause = (
        "The official recipe makes sentences unit length, however long hidden states are: recipe='stable' does not."
        if shift.recipe == "official"
        else "Their vectors hardly differ from the pivot's there: take another area, or raise alpha."
    )
    return (
        f"The shift of {', '.join(low)} moves next to nothing (alpha = {shift.alpha_of(longest):g}; {longest}: "
        f"{low[longest]:.2g} of the median norm at most). {cause}"
    )


def check_area(forward: int, backward: int, boundaries: int, recipe: str) -> None:
    """Refuse boundaries that are not f < b of a model with so many; ValueError or TypeError says which and why."""
    if recipe not in ("stable", "official"):
        raise ValueError(f"recipe: got {recipe!r}, wanted 'stable' or 'official'.")
    lowest = 1 if recipe == "official" else 0
    for name, value in (("forward", forward), ("backward", backward)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, wanted the number of a boundary (an int).")
        if not lowest <= value < boundaries:
            raise ValueError(
                f"{name}: got boundary {value}, wanted {lowest} … {boundaries - 1} "
                f"(the model has {boundaries} blocks)."
            )
    if forward >= backward:
        raise ValueError(
            f"forward, backward: got {forward} and {backward}, wanted forward < backward; the shift toward the "
            "pivot comes before the shift back."
        )
