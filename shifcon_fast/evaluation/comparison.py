"""Two models on the same questions and sentences: which differences are noise.

Two evaluations say nothing about another training run: :mod:`.system_comparison` compares methods over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shifcon_fast.data.languages import find_language
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
