"""The report's section on multiple choice."""

from __future__ import annotations

from shifcon_fast.evaluation import plots
from shifcon_fast.evaluation.cells import difference_cell, share_cell
from shifcon_fast.evaluation.choice_scores import choice_accuracy, choice_differences, choice_groups
from shifcon_fast.evaluation.comparison import PairedComparison
from shifcon_fast.evaluation.page import Block, Cell, Picture, Section, Table
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.evaluation.sections import system_names


def choice_section(
    result: EvaluationResult, other: EvaluationResult | None = None, against: PairedComparison | None = None
) -> Section:
    """Right choices by language: without and with the shift, beside a second model, and by kind of question."""
    used = result.multiple_choice.get(result.mode, [])
    if not used:
        return Section("Multiple choice")
    before, after = system_names(result, other)
    systems = {
        mode if result.area is not None else after: outcomes
        for mode, outcomes in result.multiple_choice.items()
    }
    if other is not None and other.multiple_choice:
        systems = {before: other.multiple_choice[other.mode], **systems}
    shares = {name: choice_accuracy(outcomes) for name, outcomes in systems.items()}
    columns = dict(shares)
    columns[f"{list(systems)[-1]}, per character"] = choice_accuracy(used, normalised=True)
    differences = {}
    if result.area is not None:
        differences["shifted − unshifted"] = choice_differences(used, result.multiple_choice["unshifted"])
    if against is not None and against.choice_accuracy:
        differences[f"against {before}"] = against.choice_accuracy
    rows: list[list[Cell | str]] = [
        [
            code,
            *(share_cell(found[code]) if code in found else "–" for found in columns.values()),
            *(difference_cell(found[code]) if code in found else "–" for found in differences.values()),
        ]
        for code in choice_accuracy(used)
    ]
    most = max(len(outcome.choices) for outcome in used)
    chance = sum(1 / len(outcome.choices) for outcome in used) / len(used)
    caption = (
        f"Share of questions whose right choice, of up to {most}, has the greatest log-likelihood (acc), and the "
        f"greatest per character (acc_norm). Chance is {100 * chance:.0f} %. Wilson intervals; differences in acc "
        "by paired bootstrap over the same questions."
    )
    blocks: list[Block] = [
        Picture.draw(
            plots.accuracy_plot,
            {"right choices by language": shares},
            alt="Share of right choices by language, with intervals.",
        ),
        Table(["language", *columns, *differences], rows, caption),
    ]
    groups = choice_groups(used)
    if len(groups) > 1:
        by_group = {group: choice_accuracy(used, group=group) for group in groups}
        blocks.append(
            Table(
                ["language", *(group or "others" for group in groups)],
                [
                    [
                        code,
                        *(share_cell(found[code]) if code in found else "–" for found in by_group.values()),
                    ]
                    for code in choice_accuracy(used)
                ],
                f"Right choices (acc) by kind of question, {result.mode}.",
            )
        )
    return Section("Multiple choice", blocks)
