"""What the ``shifcon`` commands print: plain text tables of a space, an evaluation and a comparison."""

from __future__ import annotations

from shifcon_fast.evaluation.choice_scores import choice_accuracy, choice_differences
from shifcon_fast.evaluation.comparison import PairedComparison
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.space.area import Area
from shifcon_fast.space.language_space import LanguageSpace


def space_table(space: LanguageSpace, area: Area) -> str:
    """Distances, dose and sink share by boundary, averaged over the other languages; ``<`` marks the area."""
    others = [language for language in space.languages if language != space.pivot]
    lines = ["boundary  distance  noise floor  excess  dose   sink share"]
    for k in range(space.num_boundaries):
        dose = sum(space.dose(k, language) for language in others) / len(others)
        mark = " <" if area.span is not None and area.span[0] <= k < area.span[1] else ""
        lines.append(
            f"{k:8}  {area.distances[k]:8.2f}  {area.floor[k]:11.2f}  {area.excess[k]:6.0%}  {dose:5.2f}  "
            f"{float(space.sink_share[k].mean()):10.3f}{mark}"
        )
    return "\n".join(lines)


def result_table(result: EvaluationResult) -> str:
    """Answers, perplexity, retrieval and choices by language, as the model is used."""
    accuracy, perplexity = result.accuracy(), result.perplexity.get(result.mode, {})
    scores = result.retrieval[result.mode].scores if result.retrieval else {}
    lines = [f"{result.model} ({result.mode})"]
    if accuracy or perplexity:
        lines.append("language  correct              perplexity  MEXA (mean, best boundary)")
    for language in dict.fromkeys([*accuracy, *perplexity]):
        correct = (
            f"{accuracy[language].estimate:6.1%} [{accuracy[language].low:.1%}, {accuracy[language].high:.1%}]"
            if language in accuracy
            else "-"
        )
        fluent = f"{perplexity[language].value:10.2f}" if language in perplexity else "         -"
        mexa = scores[language].mexa if language in scores else []
        aligned = f"{sum(mexa) / len(mexa):.2f}, {max(mexa):.2f}" if mexa else "-"
        lines.append(f"{language:8}  {correct:23}  {fluent}  {aligned}")
    return "\n".join([*lines, *_choice_lines(result)])


def _choice_lines(result: EvaluationResult) -> list[str]:
    """Right choices by language in every mode, and what the shift does to them."""
    if not result.multiple_choice:
        return []
    used = result.multiple_choice[result.mode]
    columns = {
        f"{name} {mode}": choice_accuracy(outcomes, normalised=name == "acc_norm")
        for mode, outcomes in result.multiple_choice.items()
        for name in ("acc", "acc_norm")
    }
    effect = choice_differences(used, result.multiple_choice["unshifted"]) if result.mode == "shifted" else {}
    header = [
        "language",
        *(f"{name:21}" for name in columns),
        *(["acc, shifted - unshifted"] if effect else []),
    ]
    lines = ["  ".join(header)]
    for language in choice_accuracy(used):
        cells = [
            f"{interval.estimate:6.1%} [{interval.low:.1%}, {interval.high:.1%}]"
            for interval in (found[language] for found in columns.values())
        ]
        if effect:
            change = effect[language]
            noise = "" if change.excludes_zero else "  within noise"
            cells.append(
                f"{100 * change.estimate:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]{noise}"
            )
        lines.append("  ".join([f"{language:8}", *(f"{cell:21}" for cell in cells)]).rstrip())
    return lines


def comparison_table(comparison: PairedComparison) -> str:
    """Differences by language with their intervals."""
    lines = [f"{comparison.model} minus {comparison.against}, 95 % intervals of a paired bootstrap"]
    for title, unit, intervals in (
        ("correct answers", 100.0, comparison.accuracy),
        ("right choices", 100.0, comparison.choice_accuracy),
        ("per character", 100.0, comparison.choice_accuracy_norm),
        ("log perplexity", 1.0, comparison.log_perplexity),
    ):
        for language, interval in intervals.items():
            verdict = "" if interval.excludes_zero else "  within noise"
            lines.append(
                f"  {title:16} {language:4} {unit * interval.estimate:+8.3f} "
                f"[{unit * interval.low:+.3f}, {unit * interval.high:+.3f}]{verdict}"
            )
    return "\n".join(lines)
