"""Training methods, each with several seeds, on the same questions and sentences: which differences are noise."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import ConfigDict, Field, with_config
from typing_extensions import Required, TypedDict

from shifcon_fast.evaluation.across_seeds import Outcomes, paired_seeds_interval, seeds_interval
from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.perplexity import Perplexity
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.json_record import JsonRecord

ANSWERS, CHOICES = "answers", "choices"
"""The kinds of question of an evaluation where its file names none: answered freely, and of several choices."""


@with_config(ConfigDict(extra="allow"))
class LoggedStep(TypedDict, total=False):
    """An entry of a training log: the step and what was measured since the entry before."""

    step: Required[Annotated[int, Field(ge=0)]]
    loss: float
    loss_generation: float
    loss_contrastive: float


@dataclass(frozen=True)
class ItemOutcome:
    """One answered question.

    Attributes:
        item: which question. The same id in two languages asks the same thing; the same id under two seeds is the
            same question. Where every seed has a test of its own, ids must differ between seeds.
        group: the kind of question, such as ``"seen only in English"``.
    """

    item: str
    group: str
    correct: bool


@dataclass(frozen=True)
class SystemComparison(JsonRecord):
    """Outcomes of several systems.

    Attributes:
        outcomes: system → seed → language → outcomes; every system with the seeds and questions of ``baseline``.
        baseline: the system that the others are measured against, such as plain QLoRA.
        before: the untrained system, if it is there; shown, but not measured against the baseline.
        logs: system → seed → training log (see :func:`shifcon_fast.evaluation.plots.loss_plot`).
        headline: the kind of question that is told first; None for all of them together.
        perplexity: system → seed → language → sentences; the same ones for every system and seed.
    """

    KIND = "system comparison"
    WANTED = "a comparison of systems"

    pivot: str
    baseline: str
    outcomes: dict[str, dict[str, dict[str, list[ItemOutcome]]]]
    before: str | None = None
    logs: dict[str, dict[str, list[LoggedStep]]] = field(default_factory=dict)
    headline: str | None = None
    perplexity: dict[str, dict[str, dict[str, Perplexity]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = {
            (code, tuple(each.tokens))
            for seeds in self.perplexity.values()
            for scored in seeds.values()
            for code, each in scored.items()
        }
        if len(tokens) > len({code for code, _ in tokens}):
            raise ValueError(
                "perplexity: wanted the same sentences, cut into the same tokens, for every system"
            )
        if self.headline not in (None, *self.groups):
            raise ValueError(f"headline: got {self.headline!r}; wanted one of {', '.join(self.groups)}")
        for name in (self.baseline, self.before):
            if name is not None and name not in self.outcomes:
                raise ValueError(f"outcomes has no system {name!r}; it has {', '.join(self.outcomes)}")
        for system, seeds in self.outcomes.items():
            if not seeds:
                raise ValueError(f"outcomes has no seed for {system!r}; wanted at least one")
            for seed, languages in seeds.items():
                if self.pivot not in languages:
                    raise ValueError(f"outcomes of {system!r}, seed {seed}, lack the pivot {self.pivot!r}")

    @property
    def systems(self) -> list[str]:
        """All systems, in order."""
        return list(self.outcomes)

    @property
    def contenders(self) -> list[str]:
        """The systems that are measured against the baseline."""
        return [system for system in self.outcomes if system not in (self.baseline, self.before)]

    @property
    def languages(self) -> list[str]:
        """The pivot, then the other languages in the order of the data."""
        found = [
            code for seeds in self.outcomes.values() for languages in seeds.values() for code in languages
        ]
        return list(dict.fromkeys([self.pivot, *found]))

    @property
    def others(self) -> list[str]:
        """The languages but the pivot."""
        return self.languages[1:]

    @property
    def groups(self) -> list[str]:
        """The kinds of question, in order of appearance."""
        return list(
            dict.fromkeys(
                outcome.group
                for seeds in self.outcomes.values()
                for languages in seeds.values()
                for outcomes in languages.values()
                for outcome in outcomes
            )
        )

    @property
    def seeds(self) -> list[str]:
        """The seeds of the baseline, which all trained systems share."""
        return list(self.outcomes[self.baseline])

    def share(self, system: str, languages: Sequence[str], group: str | None = None) -> Interval:
        """Share of right answers in some languages, averaged over them question by question.

        The interval accounts for seeds and questions; a question asked in three languages is one question.
        """
        return seeds_interval(self._scores(system, languages, group))

    def difference(
        self, system: str, against: str, languages: Sequence[str], group: str | None = None
    ) -> Interval:
        """``system − against``, paired by seed and question, over the seeds that both have."""
        ours, theirs = (self._scores(name, languages, group) for name in (system, against))
        return paired_seeds_interval(*self._with_seeds_of_both(system, ours, against, theirs))

    def log_perplexity(self, system: str, against: str, languages: Sequence[str]) -> Interval:
        """Mean log ratio of the perplexities in some languages, paired by seed and sentence; below 0 is better.

        It is infinite where a model finds a sentence impossible.
        """
        scored = (self._nats(name, languages) for name in (system, against))
        ours, theirs = self._with_seeds_of_both(system, next(scored), against, next(scored))
        if not all(
            math.isfinite(nats) for of in (ours, theirs) for found in of.values() for nats in found.values()
        ):
            return Interval(math.inf, math.inf, math.inf)
        return paired_seeds_interval(ours, theirs)

    def _with_seeds_of_both(
        self, system: str, ours: Outcomes, against: str, theirs: Outcomes
    ) -> tuple[Outcomes, Outcomes]:
        """Those of the seeds that both have; an untrained system is the same whatever the seed."""
        if system == self.before and len(ours) == 1:
            ours = dict.fromkeys(theirs, next(iter(ours.values())))
        if against == self.before and len(theirs) == 1:
            theirs = dict.fromkeys(ours, next(iter(theirs.values())))
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            raise ValueError(
                f"outcomes: {system!r} has the seeds {', '.join(map(str, ours))}, {against!r} "
                f"{', '.join(map(str, theirs))}; wanted one in common"
            )
        return {seed: ours[seed] for seed in seeds}, {seed: theirs[seed] for seed in seeds}

    def _nats(self, system: str, languages: Sequence[str]) -> dict[Hashable, dict[Hashable, float]]:
        """Seed → sentence → nats, of which the mean over sentences is nats a token, averaged over languages."""
        found: dict[Hashable, dict[Hashable, float]] = {}
        for seed, scored in self.perplexity[system].items():
            nats: dict[Hashable, float] = {}
            for code in languages:
                each = scored[code]
                scale = len(each.tokens) / sum(each.tokens) / len(languages)
                for row, value in enumerate(each.nll):
                    nats[row] = nats.get(row, 0.0) + value * scale
            found[seed] = nats
        return found

    def _scores(
        self, system: str, languages: Sequence[str], group: str | None
    ) -> dict[Hashable, dict[Hashable, float]]:
        """Seed → question → mean outcome over the languages it is asked in."""
        scores: dict[Hashable, dict[Hashable, float]] = {}
        for seed, found in self.outcomes[system].items():
            answers: dict[str, list[bool]] = {}
            for code in languages:
                for outcome in found.get(code, ()):
                    if group in (None, outcome.group):
                        answers.setdefault(f"{outcome.group}\n{outcome.item}", []).append(outcome.correct)
            scores[seed] = {item: sum(values) / len(values) for item, values in answers.items()}
        return scores


def compare_results(
    results: Mapping[str, Sequence[EvaluationResult] | Mapping[str, EvaluationResult]],
    baseline: str,
    *,
    before: str | None = None,
) -> SystemComparison:
    """Systems from their evaluations, each model as it is used: shifted where it is attached.

    Args:
        results: system → seed → evaluation; or the evaluations alone, in the same order of seeds for all systems.
        baseline, before: as for :class:`SystemComparison`.

    Raises:
        ValueError: no question; other questions, or another pivot, for two evaluations.
    """
    named: dict[str, Mapping[str, EvaluationResult]] = {
        system: found
        if isinstance(found, Mapping)
        else {str(i): each for i, each in enumerate(found, start=1)}
        for system, found in results.items()
    }
    first = next(iter(next(iter(named.values())).values()))
    wanted = _questions(first)
    for result in (each for seeds in named.values() for each in seeds.values()):
        if result.pivot != first.pivot:
            raise ValueError(
                f"{result.model}: its pivot is {result.pivot!r}, that of {first.model} {first.pivot!r}"
            )
        if _questions(result) != wanted:
            raise ValueError(
                f"{result.model}: other questions than {first.model}; evaluate both on the same file, in the same "
                "languages"
            )
    if not wanted:
        raise ValueError(f"{first.model}: no questions were asked; wanted evaluations with --questions")
    outcomes = {
        system: {seed: _answers(result) for seed, result in seeds.items()} for system, seeds in named.items()
    }
    scored = all(result.perplexity for seeds in named.values() for result in seeds.values())
    perplexity = (
        {
            system: {seed: result.perplexity[result.mode] for seed, result in seeds.items()}
            for system, seeds in named.items()
        }
        if scored
        else {}
    )
    return SystemComparison(first.pivot, baseline, outcomes, before, perplexity=perplexity)


def _questions(result: EvaluationResult) -> dict[tuple[str, int, str], str]:
    """(kind, row, language) → the right answer."""
    free = {(ANSWERS, each.row, each.language): each.answer for each in result.outcomes}
    chosen = {
        (each.group or CHOICES, each.row, each.language): each.choices[each.gold]
        for each in result.multiple_choice.get(result.mode, ())
    }
    return {**free, **chosen}


def _answers(result: EvaluationResult) -> dict[str, list[ItemOutcome]]:
    found: dict[str, list[ItemOutcome]] = {}
    for each in result.outcomes:
        found.setdefault(each.language, []).append(ItemOutcome(str(each.row), ANSWERS, each.correct))
    for choice in result.multiple_choice.get(result.mode, ()):
        item = ItemOutcome(str(choice.row), choice.group or CHOICES, choice.correct)
        found.setdefault(choice.language, []).append(item)
    return found
