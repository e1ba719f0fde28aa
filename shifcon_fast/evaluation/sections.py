"""The sections of a report, each from the numbers it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from shifcon_fast.evaluation import plots
from shifcon_fast.evaluation.cells import difference_cell, ratio_cell, share_cell
from shifcon_fast.evaluation.comparison import PairedComparison
from shifcon_fast.evaluation.page import (
    Block,
    Cell,
    Picture,
    Section,
    Table,
    Text,
)
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.evaluation.retrieval import Retrieval
from shifcon_fast.evaluation.system_comparison import SystemComparison
from shifcon_fast.space.area import Area
from shifcon_fast.space.language_space import LanguageSpace

_INTERVALS = "95 % intervals in brackets."
_SEED_INTERVALS = (
    "95 % intervals in brackets, over training seeds and questions "
    "(two-way analysis of variance, Student's t)."
)


def comparison_sections(comparison: SystemComparison) -> list[Section]:
    """Summary, differences, accuracy and training curves of several systems."""
    sections = [_summary(comparison)]
    if comparison.contenders:
        sections.append(_differences(comparison))
    sections.append(_accuracies(comparison))
    if any(comparison.logs.values()):
        sections.append(
            training_section(
                {system: list(runs.values()) for system, runs in comparison.logs.items() if runs},
                systems=comparison.systems,
            )
        )
    return sections


def area_section(space: LanguageSpace, area: Area, *, chosen: tuple[int, int] | None = None) -> Section:
    """Where to shift: the subspace distance at every boundary, and the area.

    Args:
        space: has subspaces.
        area: what is recommended.
        chosen: the area (forward, backward) that was used instead.
    """
    shifted = chosen or area.span
    estimated, boundaries = set(space.boundaries), list(range(space.num_boundaries))
    by_language = {
        code: [space.distance(k, code, space.pivot) if k in estimated else float("nan") for k in boundaries]
        for code in space.languages
        if code != space.pivot
    }
    picture = Picture.draw(
        plots.distance_plot,
        boundaries,
        area.distances,
        area.floor,
        area=shifted,
        split_distances=area.split_distances,
        by_language=by_language if len(by_language) > 1 else None,
        alt=f"Subspace distance to {space.pivot} by boundary, with its noise floor"
        + (f"; boundaries {shifted[0]} to {shifted[1] - 1} are shaded." if shifted else "."),
        caption="The noise floor is the distance between two halves of one language's sentences: how far apart "
        "samples of the same thing lie. A distance from as many sentences that is close to it says nothing.",
    )
    text = (
        f"Hidden states of other languages are moved to {space.pivot} at boundary {shifted[0]} and back at "
        f"boundary {shifted[1]}."
        if shifted
        else "No area is recommended."
    )
    reason = area.reason
    if shifted != area.span and area.span is not None:
        reason = f"What is recommended is [{area.span[0]}, {area.span[1]}). {reason}"
    return Section("Layer area", [Text([text, reason]), picture])


def training_section(
    logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], *, systems: Sequence[str] = ()
) -> Section:
    """Loss curves: system → a log for each seed."""
    picture = Picture.draw(
        plots.loss_plot,
        logs,
        systems=systems,
        alt="Generation loss and contrastive loss by training step.",
        caption="Thin: every logged step of every run. Bold: averaged over a twentieth of the run and over seeds. "
        "Losses are shown before their weights.",
    )
    return Section("Training", [picture])


def accuracy_section(
    result: EvaluationResult, other: EvaluationResult | None = None, against: PairedComparison | None = None
) -> Section:
    """Right answers by language, alone or beside a second model."""
    if not result.outcomes:
        return Section("Answers")
    before, after = system_names(result, other)
    shares = {after: result.accuracy()}
    if other is not None and other.outcomes:
        shares = {before: other.accuracy(), **shares}
    language = result.answer_language()
    header = [
        "language",
        *shares,
        *(["difference"] if against and against.accuracy else []),
        "in its language",
    ]
    rows: list[list[Cell | str]] = []
    for code in result.accuracy():
        row: list[Cell | str] = [code]
        row += [share_cell(found[code]) if code in found else "–" for found in shares.values()]
        if against and against.accuracy:
            row.append(difference_cell(against.accuracy[code]) if code in against.accuracy else "–")
        said = language[code]
        row.append("undecided" if said is None else share_cell(said))
        rows.append(row)
    picture = Picture.draw(
        plots.accuracy_plot,
        {"right answers by language": shares},
        alt="Share of right answers by language, with intervals.",
    )
    caption = (
        "Exact match of the final answer, greedy decoding. Wilson intervals; differences by paired bootstrap over "
        "the same questions. The last column counts the answers whose language can be told."
    )
    return Section("Answers", [picture, Table(header, rows, caption)])


def retrieval_section(result: EvaluationResult, other: EvaluationResult | None = None) -> Section:
    """Do translations find each other? By boundary, and between all languages before and after."""
    if not result.retrieval:
        return Section("Retrieval")
    found = result.retrieval[result.mode]
    area = (result.area["forward"], result.area["backward"]) if result.area else None
    blocks: list[Block] = [
        Text(
            [
                f"Of {found.sentences} sentences, the share whose translation is nearer (cosine of mean hidden "
                f"states) than every other sentence; chance is {100 / found.sentences:.1f} %. MEXA asks it of both "
                f"directions at once; its mean over boundaries and languages: {_mean_mexa(result)}."
            ]
        )
    ]
    if found.boundaries and found.scores:
        measures = {
            "retrieval, mean of both directions": {
                mode: {
                    code: [(a + b) / 2 for a, b in zip(scores.to_pivot, scores.from_pivot, strict=True)]
                    for code, scores in measured.scores.items()
                }
                for mode, measured in result.retrieval.items()
            },
            "MEXA": {
                mode: {code: scores.mexa for code, scores in measured.scores.items()}
                for mode, measured in result.retrieval.items()
            },
        }
        blocks.append(
            Picture.draw(
                plots.retrieval_by_boundary_plot,
                found.boundaries,
                measures,
                area=area,
                alt="Retrieval and MEXA against the pivot by boundary.",
                caption=f"Against the pivot {found.pivot}, at every boundary.",
            )
        )
    blocks.append(_matrices(result, other))
    copies = {code: count for code, count in found.duplicates.items() if count}
    if copies:
        listed = ", ".join(f"{code} {count}" for code, count in copies.items())
        blocks.append(Text([f"Sentences with an exact copy, which cannot be found: {listed}."]))
    return Section("Retrieval", blocks)


def perplexity_section(result: EvaluationResult, against: PairedComparison | None = None) -> Section:
    """Perplexity by language and mode."""
    if not result.perplexity:
        return Section("Perplexity")
    compared = against.log_perplexity if against else {}
    header = ["language", *result.perplexity, *(["change"] if compared else [])]
    rows: list[list[Cell | str]] = []
    for code in next(iter(result.perplexity.values())):
        row: list[Cell | str] = [code]
        row += [f"{languages[code].value:,.2f}" for languages in result.perplexity.values()]
        if compared:
            row.append(ratio_cell(compared[code]) if code in compared else "–")
        rows.append(row)
    caption = (
        "Whole sentences, every token weighs the same. Compare models on one language; across languages the "
        "tokenizer is compared as well."
    )
    return Section("Perplexity", [Table(header, rows, caption)])


def settings_section(groups: Mapping[str, Mapping[str, Any]]) -> Section:
    """What the numbers depend on: title → name → value."""
    blocks = [
        Table([title, ""], [[name, _plain(value)] for name, value in values.items()])
        for title, values in groups.items()
        if values
    ]
    return Section("Settings and versions", blocks)


def _summary(comparison: SystemComparison) -> Section:
    """Each system against the baseline: the mean of the weak languages, and what it costs the pivot."""
    group, others, pivot = comparison.headline, comparison.others, comparison.pivot
    name = f"mean of {', '.join(others)}" if len(others) > 1 else others[0]
    blocks: list[Block] = []
    if comparison.contenders:
        differences = {
            label: {
                system: comparison.difference(system, comparison.baseline, languages, group)
                for system in comparison.contenders
            }
            for label, languages in ((name, others), (f"pivot {pivot}", [pivot]))
        }
        blocks.append(
            Picture.draw(
                plots.forest_plot,
                differences,
                xlabel=f"points, against {comparison.baseline}" + (f"; {group}" if group else ""),
                alt=f"Difference of each system to {comparison.baseline}, with intervals.",
            )
        )
    rows: list[list[Cell | str]] = []
    for system in comparison.systems:
        row: list[Cell | str] = [system]
        row += [share_cell(comparison.share(system, languages, group)) for languages in (others, [pivot])]
        for languages in (others, [pivot]) if comparison.contenders else ():
            compared = system in comparison.contenders
            change = (
                comparison.difference(system, comparison.baseline, languages, group) if compared else None
            )
            row.append("–" if change is None else difference_cell(change))
        if comparison.perplexity:
            compared = system != comparison.baseline
            ratio = comparison.log_perplexity(system, comparison.baseline, others) if compared else None
            row.append("–" if ratio is None else ratio_cell(ratio))
        row.append(str(len(comparison.outcomes[system])))
        rows.append(row)
    header = ["system", name, pivot]
    header += [f"points: {name}", f"points: {pivot}"] if comparison.contenders else []
    header += [f"perplexity: {name}"] if comparison.perplexity else []
    count = len(comparison.contenders) * len(comparison.languages)
    caption = (
        f"Right answers{f', {group}' if group else ''}, and against {comparison.baseline}. {_SEED_INTERVALS} One "
        f"seed says nothing about another training run. Of {count} comparisons by language, about one in twenty "
        "leaves zero out by chance alone."
    )
    return Section("Summary", [*blocks, Table([*header, "seeds"], rows, caption)])


def _differences(comparison: SystemComparison) -> Section:
    columns = [([code], code) for code in comparison.languages]
    if len(comparison.others) > 1:
        columns.append((comparison.others, f"mean of {', '.join(comparison.others)}"))
    blocks: list[Block] = [
        Picture.draw(
            plots.difference_plot,
            {
                group: {
                    system: {
                        code: comparison.difference(system, comparison.baseline, [code], group)
                        for code in comparison.languages
                    }
                    for system in comparison.contenders
                }
                for group in comparison.groups
            },
            ylabel=f"points, against {comparison.baseline}",
            systems=comparison.systems,
            alt=f"Differences to {comparison.baseline} by language and system, with intervals.",
            caption="An interval that crosses zero is a difference within noise.",
        )
    ]
    for group in comparison.groups:
        rows: list[list[Cell | str]] = [
            [
                system,
                *(
                    difference_cell(comparison.difference(system, comparison.baseline, languages, group))
                    for languages, _ in columns
                ),
            ]
            for system in comparison.contenders
        ]
        caption = (
            f"{_sentence(group)}: points more than {comparison.baseline}, paired by seed and question. "
            f"{_INTERVALS}"
        )
        blocks.append(Table(["system", *(name for _, name in columns)], rows, caption))
    return Section(f"Against {comparison.baseline}", blocks)


def _accuracies(comparison: SystemComparison) -> Section:
    blocks: list[Block] = [
        Picture.draw(
            plots.accuracy_plot,
            {
                group: {
                    system: {code: comparison.share(system, [code], group) for code in comparison.languages}
                    for system in comparison.systems
                }
                for group in comparison.groups
            },
            systems=comparison.systems,
            alt="Share of right answers by language and system, with intervals.",
        )
    ]
    for group in comparison.groups:
        rows: list[list[Cell | str]] = [
            [system, *(share_cell(comparison.share(system, [code], group)) for code in comparison.languages)]
            for system in comparison.systems
        ]
        caption = f"{_sentence(group)}: right answers. {_SEED_INTERVALS}"
        blocks.append(Table(["system", *comparison.languages], rows, caption))
    blocks.append(_by_seed(comparison))
    return Section("Right answers", blocks)


def _by_seed(comparison: SystemComparison) -> Table:
    """Every seed on its own, so that nothing hides in an average."""
    rows: list[list[Cell | str]] = []
    for system, seeds in comparison.outcomes.items():
        row: list[Cell | str] = [system]
        for code in comparison.languages:
            shares = [[outcome.correct for outcome in found.get(code, ())] for found in seeds.values()]
            row.append(
                " · ".join(f"{100 * sum(right) / len(right):.1f}" if right else "–" for right in shares)
            )
        rows.append(row)
    order = ", ".join(comparison.seeds)
    caption = f"Every run on its own, in percent of all questions; seeds {order} in this order."
    return Table(["system", *comparison.languages], rows, caption)


def system_names(result: EvaluationResult, other: EvaluationResult | None) -> tuple[str, str]:
    """What to call the model compared with and the evaluated one: the ends of their names, if those differ."""
    if other is None:
        return "", PurePath(result.model).name
    names = PurePath(other.model).name, PurePath(result.model).name
    return names if names[0] != names[1] and all(names) else ("compared with", "evaluated model")


def _mean_mexa(result: EvaluationResult) -> str:
    means = {}
    for mode, found in result.retrieval.items():
        values = [value for scores in found.scores.values() for value in scores.mexa]
        means[mode] = sum(values) / len(values) if values else float("nan")
    return ", ".join(f"{100 * value:.1f} % {mode}" for mode, value in means.items())


def _matrices(result: EvaluationResult, other: EvaluationResult | None) -> Picture:
    after: Retrieval = result.retrieval[result.mode]
    before: Retrieval | None = None
    titles: tuple[str, str] = (result.mode, result.mode)
    theirs = other.retrieval.get(other.mode) if other is not None else None
    if theirs is not None and (theirs.languages, theirs.matrix_boundary) == (
        after.languages,
        after.matrix_boundary,
    ):
        before, titles = theirs, system_names(result, other)
    elif result.mode == "shifted":
        before, titles = result.retrieval["unshifted"], ("unshifted", "shifted")
    return Picture.draw(
        plots.retrieval_matrix_plot,
        after.languages,
        before.matrix if before is not None else after.matrix,
        after.matrix if before is not None else None,
        titles=titles,
        alt="Top-1 retrieval between all pairs of languages.",
        caption=f"Top-1 retrieval between all pairs of languages at boundary {after.matrix_boundary}, in percent.",
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {inner}" for name, inner in value.items()) or "none"
    return "none" if value is None else str(value)
