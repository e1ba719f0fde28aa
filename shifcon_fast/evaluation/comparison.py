"""Models on the same questions: two of them, or several systems over several seeds; which differences are noise.

:class:`PairedComparison` is of two evaluations, and says nothing about another training run.
:class:`SystemComparison` is of training methods, each with several seeds.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, with_config
from typing_extensions import Required, TypedDict

from shifcon_fast.data.languages import find_language
from shifcon_fast.evaluation.across_seeds import paired_seeds_interval, seeds_interval
from shifcon_fast.evaluation.bootstrap import Interval, paired_interval, ratio_interval
from shifcon_fast.evaluation.choice_scores import choice_differences
from shifcon_fast.evaluation.perplexity import Perplexity
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.json_record import JsonRecord

FILE_NAME = "comparison.json"
T = TypeVar("T")


@dataclass(frozen=True)
class PairedComparison(JsonRecord):
    """One model minus another on the same items, language by language.

    Attributes:
        accuracy: difference of the shares of right answers.
        log_perplexity: difference of the mean negative log-likelihoods (nats a token); below zero is better.
            exp of it is the ratio of the perplexities. Only for languages on which both models predicted the
            same tokens.
        choice_accuracy, choice_accuracy_norm: difference of the shares of right choices, of the greatest
            log-likelihood, and of the greatest per character.
    """

    KIND = "comparison"
    FILE_NAME = FILE_NAME
    WANTED = "the comparison that `shifcon evaluate --against` writes"

    model: str
    against: str
    accuracy: dict[str, Interval]
    log_perplexity: dict[str, Interval]
    choice_accuracy: dict[str, Interval] = field(default_factory=dict)
    choice_accuracy_norm: dict[str, Interval] = field(default_factory=dict)


def compare(
    result: EvaluationResult,
    against: EvaluationResult,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """``result − against`` with paired bootstrap intervals, over the languages that both were measured in.

    Each model counts as it is used: shifted where it is attached.

    Raises:
        ValueError: nothing in common, or other questions in a language.
    """
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    measured = result.perplexity.values()
    codes = list(dict.fromkeys([*result.by_language(), *(code for mode in measured for code in mode)]))
    ours, theirs = result.by_language(), _as_named(against.by_language(), codes)
    accuracy = {}
    for code in [code for code in ours if code in theirs]:
        first = {outcome.row: outcome for outcome in ours[code]}
        second = {outcome.row: outcome for outcome in theirs[code]}
        if {row: o.answer for row, o in first.items()} != {row: o.answer for row, o in second.items()}:
            raise ValueError(
                f"against: the two results hold different questions in {code!r} ({len(first)} and {len(second)}); "
                "evaluate both on the same file"
            )
        accuracy[code] = paired_interval(
            [o.correct for o in first.values()], [second[row].correct for row in first], **options
        )
    scored = result.perplexity.get(result.mode, {})
    other = _as_named(against.perplexity.get(against.mode, {}), codes)
    log_perplexity = {
        code: _log_ratio(scored[code], other[code], options)
        for code in scored
        if code in other and scored[code].tokens == other[code].tokens
    }
    choices, choices_norm = (
        choice_differences(
            result.multiple_choice.get(result.mode, []),
            against.multiple_choice.get(against.mode, []),
            normalised=normalised,
            **options,
        )
        for normalised in (False, True)
    )
    if not accuracy and not log_perplexity and not choices:
        raise ValueError(
            "against: the two results have no question and no sentence in common; evaluate both on the same files"
        )
    return PairedComparison(result.model, against.model, accuracy, log_perplexity, choices, choices_norm)


def _as_named(values: Mapping[str, T], codes: Sequence[str]) -> dict[str, T]:
    """The values under the spelling that ``codes`` has of their languages, where it has one."""
    return {find_language(code, codes) or code: value for code, value in values.items()}


def _log_ratio(first: Perplexity, second: Perplexity, options: Mapping[str, Any]) -> Interval:
    scored = [
        (a - b, tokens) for a, b, tokens in zip(first.nll, second.nll, first.tokens, strict=True) if tokens
    ]
    return ratio_interval([d for d, _ in scored], [tokens for _, tokens in scored], **options)


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
    """

    KIND = "system comparison"
    WANTED = "a comparison of systems"

    pivot: str
    baseline: str
    outcomes: dict[str, dict[str, dict[str, list[ItemOutcome]]]]
    before: str | None = None
    logs: dict[str, dict[str, list[LoggedStep]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
        """``system − against``, paired by seed and question."""
        return paired_seeds_interval(
            self._scores(system, languages, group), self._scores(against, languages, group)
        )

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
