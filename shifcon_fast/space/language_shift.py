"""The language vectors at the two boundaries of a layer area: all of a language space that a shift needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from shifcon_fast.data.languages import position_of
from shifcon_fast.space.language_router import LanguageRouter

Recipe = Literal["stable", "official"]


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
        recipe: ``"stable"`` adds the vectors of boundary k at boundary k. ``"official"`` adds those of boundaries
            f and b at f−1 and b−1, as the authors' code does.
        provenance: JSON-able: where the vectors are from. ``model`` (with its ``fingerprint``), ``tokenizer``
            (with its ``special_ids``), ``sentences`` (language → count) and ``max_length`` are used again; the rest
            is for readers.
        router: tells which language a text is in, from its representation at f; None where none was estimated.

    Raises:
        ValueError, TypeError: languages twice, a pivot that is none of them, boundaries out of order or range, an
            alpha that is not finite, tensors of other shapes.
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

    def __post_init__(self) -> None:
        if len(set(self.languages)) != len(self.languages):
            raise ValueError(f"languages: got {list(self.languages)}; wanted every code once")
        if self.pivot not in self.languages:
            raise ValueError(f"pivot: got {self.pivot!r}; wanted one of {list(self.languages)}")
        check_area(self.forward, self.backward, self.num_boundaries, self.recipe)
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha: got {self.alpha}, wanted a finite number.")
        count = len(self.languages)
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

    def tables(self) -> dict[int, Tensor]:
        """block → (K, d) float32, what is added at its input: ±α (v(pivot) − v(l)), exactly 0 for the pivot."""
        toward = self.vectors[:, self.pivot_id, None] - self.vectors
        first, second = self.blocks
        return {first: self.alpha * toward[0], second: -self.alpha * toward[1]}

    def dose(self, language: str) -> tuple[float, float]:
        """‖α (v(pivot) − v(language))‖ / median ‖h‖ of the language at f and at b."""
        position = self.language_id(language)
        toward = self.vectors[:, self.pivot_id] - self.vectors[:, position]
        lengths = torch.linalg.vector_norm(toward.double(), dim=-1) / self.median_norm[:, position].double()
        at_f, at_b = (abs(self.alpha) * lengths).tolist()
        return at_f, at_b


def dose_warning(shift: LanguageShift) -> str | None:
    """One sentence where the dose of a shift at f or b is above 1 for a language; None where it is not."""
    doses = [
        (dose, language, boundary)
        for language in shift.languages
        for dose, boundary in zip(shift.dose(language), (shift.forward, shift.backward), strict=True)
    ]
    high = [each for each in doses if each[0] > 1]
    if not high:
        return None
    dose, language, boundary = max(high)
    affected = list(dict.fromkeys(each[1] for each in high))
    return (
        f"The shift of {', '.join(affected)} is longer than a hidden state (alpha = {shift.alpha:g}; {language} at "
        f"boundary {boundary}: {dose:.1f} times the median norm). Answers are known to collapse above 1: lower "
        "alpha, or take another area."
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
