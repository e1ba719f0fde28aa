"""Accuracy on multiple choice by language, and paired differences of it."""

from __future__ import annotations

from collections.abc import Sequence

from shifcon_fast.evaluation.bootstrap import Interval, paired_interval, wilson_interval
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome


def choice_accuracy(
    outcomes: Sequence[ChoiceOutcome], *, normalised: bool = False, group: str | None = None
) -> dict[str, Interval]:
    """Language → share of right choices, with its Wilson interval.

    Args:
        normalised: lm-eval's ``acc_norm`` (per character), not ``acc``.
        group: one kind of question only.
    """
    return {
        code: wilson_interval([_right(outcome, normalised) for outcome in items.values()])
        for code, items in _by_language(outcomes, group).items()
    }


def choice_differences(
    first: Sequence[ChoiceOutcome],
    second: Sequence[ChoiceOutcome],
    *,
    normalised: bool = False,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Language → ``first − second`` in the share of right choices, paired by question, for languages of both.

    Raises:
        ValueError: the two hold other questions in a language.
    """
    ours, theirs = _by_language(first), _by_language(second)
    found = {}
    for code in [code for code in ours if code in theirs]:
        a, b = ours[code], theirs[code]
        if {row: (o.choices, o.gold) for row, o in a.items()} != {
            row: (o.choices, o.gold) for row, o in b.items()
        }:
            raise ValueError(
                f"against: the two results hold different multiple-choice questions in {code!r} ({len(a)} and "
                f"{len(b)}); evaluate both on the same file"
            )
        found[code] = paired_interval(
            [_right(outcome, normalised) for outcome in a.values()],
            [_right(b[row], normalised) for row in a],
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
    return found


def choice_groups(outcomes: Sequence[ChoiceOutcome]) -> list[str]:
    """The kinds of question, in the order of the data."""
    return list(dict.fromkeys(outcome.group for outcome in outcomes))


def _by_language(
    outcomes: Sequence[ChoiceOutcome], group: str | None = None
) -> dict[str, dict[int, ChoiceOutcome]]:
    languages: dict[str, dict[int, ChoiceOutcome]] = {}
    for outcome in outcomes:
        if group in (None, outcome.group):
            languages.setdefault(outcome.language, {})[outcome.row] = outcome
    return languages


def _right(outcome: ChoiceOutcome, normalised: bool) -> bool:
    return outcome.correct_norm if normalised else outcome.correct
