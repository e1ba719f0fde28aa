"""What the shift does at candidate layer areas, without training: the measurements that decide on an area.

``shifcon_fast.evaluation.sweep`` measures them; this is their type and their file, and the figures that are drawn
from them. Sentences and questions are kept one by one, so that differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import TypedDict

from shifcon_fast.json_record import JsonRecord

FILE_NAME = "sweep.json"

Candidate = tuple[int, int, float]
"""(forward, backward, alpha): an area and the length of the shift there."""

Nats = list[float | None]
"""Negative log-likelihood of every sentence; None where it is not finite, which JSON cannot hold."""


class Scores(TypedDict):
    """Retrieval by boundary, as shares from 0 to 1."""

    to_pivot: list[float]
    from_pivot: list[float]
    mexa: list[float]


@dataclass(frozen=True)
class ShiftedRetrieval:
    """Language → scores at boundaries forward … L−2, shifted at ``forward``.

    The same for every ``backward``: what happens at b reaches no boundary before it.
    """

    forward: int
    alpha: float
    scores: dict[str, Scores]


@dataclass(frozen=True)
class SweptArea:
    """One area, measured with the shift on.

    Attributes:
        forward, backward, alpha: as for ``attach``.
        dose: language → [at forward, at backward], the length of the shift against the median hidden state.
        nll: language → nats of every sentence, in the order of ``AreaSweep.tokens``.
        right: language → whether each question was answered right, in the order of ``AreaSweep.rows``.
    """

    forward: int
    backward: int
    alpha: float
    dose: dict[str, list[float]]
    nll: dict[str, Nats]
    right: dict[str, list[bool]] = field(default_factory=dict)

    @property
    def candidate(self) -> Candidate:
        """(forward, backward, alpha)."""
        return self.forward, self.backward, self.alpha


@dataclass(frozen=True)
class Change:
    """A mean difference and its standard error; the error is NaN where it cannot be estimated."""

    estimate: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %, by the normal distribution."""
        return self.estimate - 1.96 * self.error, self.estimate + 1.96 * self.error


@dataclass(eq=False)
class AreaSweep(JsonRecord):
    """A sweep over layer areas, finished or not.

    The pivot is not in it: the shift leaves its rows alone bit for bit. Its answers are there for comparison.

    Attributes:
        pivot, languages: the pivot, and the languages that were measured, without it.
        num_boundaries: L of the model.
        max_perplexity_rise: the largest share by which an area may raise a language's perplexity to be recommended.
        identity: what the numbers depend on: model, language vectors, data, settings. A sweep is resumed only with
            the same.
        planned: all candidates of the sweep; those without an entry in ``areas`` are not measured yet.
        areas: what was measured, in order.
        tokens: language → predicted tokens of every sentence.
        nll: language → nats of every sentence, unshifted.
        rows: language → the numbers of its questions; the pivot's too. Empty without questions.
        right: language → whether each was answered right, unshifted.
        retrieval: language → scores at boundaries 0 … L−2, unshifted.
        shifted_retrieval: the same with the shift, for each ``forward`` and ``alpha``.
        seconds: how long the measuring took, over all sessions.
    """

    KIND = "area sweep"
    FILE_NAME = FILE_NAME
    WANTED = f"the {FILE_NAME} that `shifcon sweep` writes"

    pivot: str
    languages: list[str]
    num_boundaries: int
    max_perplexity_rise: float
    identity: dict[str, Any]
    planned: list[Candidate]
    areas: list[SweptArea]
    tokens: dict[str, list[int]] = field(default_factory=dict)
    nll: dict[str, Nats] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    right: dict[str, list[bool]] = field(default_factory=dict)
    retrieval: dict[str, Scores] = field(default_factory=dict)
    shifted_retrieval: list[ShiftedRetrieval] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for area in self.areas:
            self._check(area)

    @property
    def alphas(self) -> list[float]:
        """The lengths of the shift that were measured, in the order of the plan."""
        return list(dict.fromkeys(area.alpha for area in self.areas))

    @property
    def missing(self) -> list[Candidate]:
        """Candidates of the plan that are not measured yet."""
        done = {area.candidate for area in self.areas}
        return [candidate for candidate in self.planned if candidate not in done]

    def perplexity(self, language: str, area: SweptArea | None = None) -> float:
        """exp(Σ nats / Σ tokens) of a language's sentences, shifted at an area; without one, unshifted."""
        return _exp(_total((area or self).nll[language]) / sum(self.tokens[language]))

    def perplexity_ratio(self, area: SweptArea, language: str) -> float:
        """Perplexity with the shift over perplexity without it, on the same sentences."""
        change = _total(area.nll[language]) - _total(self.nll[language])
        return _exp(change / sum(self.tokens[language]))

    def worst(self, area: SweptArea) -> tuple[str, float]:
        """The language whose perplexity rises most, and its ratio."""
        ratios = {language: self.perplexity_ratio(area, language) for language in self.languages}
        language = max(ratios, key=lambda code: ratios[code])
        return language, ratios[language]

    def retrieval_change(self, area: SweptArea, measure: str = "top1") -> tuple[float, float]:
        """Unshifted and shifted: mean over the languages and the boundaries forward … backward−1.

        Args:
            measure: ``top1`` (both directions) or ``mexa``.
        """
        names = ("to_pivot", "from_pivot") if measure == "top1" else (measure,)
        shifted = self.retrieval_at(area.forward, area.alpha)
        assert shifted is not None  # measured before the area
        width = area.backward - area.forward
        before, after = [], []
        for language in self.languages:
            unshifted: Mapping[str, Any] = self.retrieval[language]
            own: Mapping[str, Any] = shifted.scores[language]
            for name in names:
                before += unshifted[name][area.forward : area.backward]
                after += own[name][:width]
        return _mean(before), _mean(after)

    def retrieval_at(self, forward: int, alpha: float) -> ShiftedRetrieval | None:
        """The scores with the shift at a boundary; None where they were not measured."""
        found = (each for each in self.shifted_retrieval if (each.forward, each.alpha) == (forward, alpha))
        return next(found, None)

    def accuracy(self, language: str, area: SweptArea | None = None) -> float:
        """Share of a language's questions answered right; NaN without questions."""
        return _mean((area or self).right.get(language, []))

    def accuracy_change(
        self, area: SweptArea, language: str | None = None, *, than: SweptArea | None = None
    ) -> Change | None:
        """How much the share of right answers changes, against another area or no shift; None without questions.

        Paired by question. Without ``language``, averaged over the languages: a question that is asked in several
        of them counts once, for its answers are not independent.
        """
        by_row: dict[int, list[int]] = {}
        for code in [language] if language is not None else self.languages:
            after, before = area.right.get(code, []), (than or self).right.get(code, [])
            for row, new, old in zip(self.rows.get(code, []), after, before, strict=True):
                by_row.setdefault(row, []).append(new - old)
        if not by_row:
            return None
        changes = [sum(found) / len(found) for found in by_row.values()]
        mean, count = _mean(changes), len(changes)
        if count < 2:
            return Change(mean, math.nan)
        variance = math.fsum((change - mean) ** 2 for change in changes) / (count - 1)
        return Change(mean, math.sqrt(variance / count))

    def is_of(self, vectors_sha256: str) -> bool:
        """Whether it was made with these language vectors."""
        return bool(self.identity.get("vectors_sha256") == vectors_sha256)

    def _check(self, area: SweptArea) -> None:
        """Raise ValueError unless everything that is asked of an area can be computed."""
        where = f"area [{area.forward}, {area.backward})"
        if not 1 <= area.forward < area.backward < self.num_boundaries:
            raise ValueError(f"areas: got {where} of {self.num_boundaries} boundaries")
        shifted = self.retrieval_at(area.forward, area.alpha)
        if not self.languages or shifted is None:
            raise ValueError(f"areas: {where} lacks its languages or its retrieval")
        last = self.num_boundaries - 1
        for code in self.languages:
            lengths = [len(of.get(code, ())) for of in (self.tokens, self.nll, area.nll)]
            if len(set(lengths)) != 1 or sum(self.tokens.get(code, ())) < 1:
                raise ValueError(
                    f"areas: {where} has {lengths} sentences in {code!r}; wanted as many everywhere"
                )
            answers = [len(of.get(code, ())) for of in (self.rows, self.right, area.right)]
            if len(set(answers)) != 1:
                raise ValueError(
                    f"areas: {where} has {answers} answers in {code!r}; wanted as many everywhere"
                )
            if len(area.dose.get(code, ())) != 2:
                raise ValueError(f"areas: {where} lacks the dose at its two boundaries in {code!r}")
            for first, scores in ((0, self.retrieval.get(code)), (area.forward, shifted.scores.get(code))):
                if scores is None or any(len(shares) != last - first for shares in scores.values()):  # type: ignore[arg-type]
                    raise ValueError(
                        f"areas: {where} lacks retrieval at boundaries {first} … {last - 1} in {code!r}"
                    )

    def _summary(self) -> list[dict[str, Any]]:
        return [self._summary_of(area) for area in self.areas]

    def _summary_of(self, area: SweptArea) -> dict[str, Any]:
        language, ratio = self.worst(area)
        accuracy = self.accuracy_change(area)
        return {
            "forward": area.forward,
            "backward": area.backward,
            "alpha": area.alpha,
            "perplexity": {code: _or_none(self.perplexity(code, area)) for code in self.languages},
            "worst_language": language,
            "worst_perplexity_ratio": _or_none(ratio),
            "retrieval": self.retrieval_change(area),
            "mexa": self.retrieval_change(area, "mexa"),
            "accuracy_change": None if accuracy is None else accuracy.estimate,
        }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _total(nats: Nats) -> float:
    return math.fsum(math.inf if each is None else each for each in nats)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _exp(value: float) -> float:
    try:
        return math.inf if math.isnan(value) else math.exp(value)
    except OverflowError:
        return math.inf
