"""What the numbers say, in words: gains, losses, and what is within noise."""

from __future__ import annotations

from collections.abc import Sequence

from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.choice_scores import choice_accuracy, choice_differences
from shifcon_fast.evaluation.comparison import PairedComparison, SystemComparison
from shifcon_fast.evaluation.result import EvaluationResult


def percent(interval: Interval) -> str:
    """``48.1 % [44.0, 52.2]``"""
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval: Interval) -> str:
    """``+2.3 points [−0.4, +5.0]``"""
    estimate, low, high = (_signed(100 * value) for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate} points [{low}, {high}]"


def verdict(interval: Interval) -> str:
    """``gain``, ``loss`` or ``within noise``: which side of zero the interval lies on, if any."""
    if not interval.excludes_zero:
        return "within noise"
    return "gain" if interval.estimate > 0 else "loss"


def comparison_findings(comparison: SystemComparison) -> list[str]:
    """One paragraph on the start, one on each system against the baseline: the weak languages, then the pivot."""
    found = []
    group = comparison.groups[0] if len(comparison.groups) > 1 else None
    asked = f", on what was {group}" if group else ""
    pivot, others = [comparison.pivot], comparison.others
    start = comparison.before or comparison.baseline
    found.append(
        f"{_when(comparison, start)}{asked}: {comparison.pivot} "
        f"{percent(comparison.share(start, pivot, group))}, the other languages on average "
        f"{percent(comparison.share(start, others, group))}."
    )
    for system in comparison.contenders:
        average = comparison.difference(system, comparison.baseline, others, group)
        single = {code: comparison.difference(system, comparison.baseline, [code], group) for code in others}
        of_pivot = comparison.difference(system, comparison.baseline, pivot, group)
        found.append(
            f"{_sentence(system)} against {comparison.baseline}{asked}: {points(average)} on average over "
            f"{_list(others)} ({_in_words(average)}). {_by_language(single)} "
            f"The pivot {comparison.pivot}: {points(of_pivot)} ({_in_words(of_pivot)})."
        )
    seeds = len(comparison.seeds)
    found.append(
        f"Intervals are 95 %, over {seeds} training seed{'s' if seeds != 1 else ''} and the questions"
        + ("." if seeds > 1 else "; with one seed they say nothing about another training run.")
        + f" Of {len(comparison.contenders) * (len(others) + 1)} comparisons by language, about one in twenty "
        "leaves zero out by chance alone."
    )
    return found


def result_findings(result: EvaluationResult, against: PairedComparison | None = None) -> list[str]:
    """What one model can do, and how it differs from a second one."""
    found = []
    accuracy = result.accuracy()
    if accuracy:
        weakest = min(accuracy, key=lambda code: accuracy[code].estimate)
        strongest = max(accuracy, key=lambda code: accuracy[code].estimate)
        text = f"Questions: best in {strongest} ({percent(accuracy[strongest])})"
        found.append(
            text + (f", weakest in {weakest} ({percent(accuracy[weakest])})." if len(accuracy) > 1 else ".")
        )
    if "shifted" in result.retrieval:
        before, after = result.retrieval["unshifted"], result.retrieval["shifted"]
        found.append(
            f"Translations find each other (MEXA, mean over boundaries and languages) for "
            f"{100 * _mean_mexa(before.scores.values()):.1f} % of the sentences unshifted and "
            f"{100 * _mean_mexa(after.scores.values()):.1f} % shifted."
        )
    found += _choice_findings(result, against)
    if against is not None and against.accuracy:
        found.append(f"Right answers, against {against.against}. {_by_language(against.accuracy)}")
        if (of_pivot := against.accuracy.get(result.pivot)) is not None:
            found.append(f"The pivot {result.pivot}: {points(of_pivot)} ({_in_words(of_pivot)}).")
    if against is not None and against.log_perplexity:
        better = {code: Interval(-i.estimate, -i.high, -i.low) for code, i in against.log_perplexity.items()}
        found.append(f"Perplexity, against {against.against}. {_by_language(better, amounts=False)}")
    return found


def _choice_findings(result: EvaluationResult, against: PairedComparison | None) -> list[str]:
    used = result.multiple_choice.get(result.mode)
    if not used:
        return []
    accuracy = choice_accuracy(used)
    weakest = min(accuracy, key=lambda code: accuracy[code].estimate)
    strongest = max(accuracy, key=lambda code: accuracy[code].estimate)
    text = f"Multiple choice: best in {strongest} ({percent(accuracy[strongest])})"
    found = [text + (f", weakest in {weakest} ({percent(accuracy[weakest])})." if len(accuracy) > 1 else ".")]
    if result.area is not None:
        effect = choice_differences(used, result.multiple_choice["unshifted"])
        effect.pop(result.pivot, None)  # it is not shifted
        if effect:
            found.append(f"Right choices, shifted against unshifted. {_by_language(effect)}")
    if against is not None and against.choice_accuracy:
        found.append(f"Right choices, against {against.against}. {_by_language(against.choice_accuracy)}")
    return found


def _by_language(differences: dict[str, Interval], *, amounts: bool = True) -> str:
    """``Gains beyond noise in sw (+4.0 points …); within noise: de, tr.``"""

    def named(meant: str) -> str:
        codes = [code for code, interval in differences.items() if verdict(interval) == meant]
        with_amounts = amounts and meant != "within noise"
        return ", ".join(f"{code} ({points(differences[code])})" if with_amounts else code for code in codes)

    gains, losses, noise = named("gain"), named("loss"), named("within noise")
    if not gains and not losses:
        return f"Each language on its own is within noise ({noise})."
    parts = [
        f"gains beyond noise in {gains}" if gains else "no gain beyond noise",
        f"losses beyond noise in {losses}" if losses else "no loss beyond noise",
        *([f"within noise: {noise}"] if noise else []),
    ]
    return _sentence("; ".join(parts)) + "."


def _in_words(interval: Interval) -> str:
    return {
        "gain": "a gain beyond noise",
        "loss": "a loss beyond noise",
        "within noise": "within noise",
    }[verdict(interval)]


def _when(comparison: SystemComparison, system: str) -> str:
    return "Before training" if system == comparison.before else _sentence(system)


def _mean_mexa(scores: object) -> float:
    values = [value for language in scores for value in language.mexa]  # type: ignore[attr-defined]
    return sum(values) / len(values) if values else 0.0


def _list(codes: Sequence[str]) -> str:
    return codes[0] if len(codes) == 1 else f"{', '.join(codes[:-1])} and {codes[-1]}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
