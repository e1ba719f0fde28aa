#!/usr/bin/env python
"""Write the experiment's report from its result files alone: one page, and the tables of docs/does-it-help.md.

    make experiment-report
    python experiments/real_models/report.py --output report/

What the document says between its marks is replaced; what stands around them was written by people.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from arms import BASE, MODELS, PIVOT, PLAIN, WEAK, arguments, runs, search_runs
from page_regions import filled
from run import RESULTS
from stored import Run, Runs, of_one_text, read_runs

from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.cells import percent, points
from shifcon_fast.evaluation.page import Section, Table
from shifcon_fast.evaluation.plots import forest_plot
from shifcon_fast.evaluation.report import write_report
from shifcon_fast.evaluation.sections import comparison_sections, settings_section
from shifcon_fast.evaluation.system_comparison import SystemComparison, compare_results
from shifcon_fast.markdown import table
from shifcon_fast.storage import write_file

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "does-it-help.md"
IMAGES = REPOSITORY / "docs" / "images"
COMMAND = "make experiment-report"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder for report.html")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    try:
        print(write(options.results, options.output, options.document))
    except ValueError as error:
        sys.exit(f"report.py: {error}")


def write(results: Path, output: Path, document: Path) -> str:
    """Write the page and the document's tables; a line on what they are of.

    Raises:
        ValueError: no model has the base and plain QLoRA yet, or a result file of another version.
    """
    every = read_runs(results, (*runs(), *search_runs()))
    of_one_text(every)
    text = document.read_text(encoding="utf-8")
    pages: list[Section] = []
    counted = []
    for model in MODELS:
        planned = [run for run in runs() if run[0] == model]
        held = by_arm(every, planned)
        counted.append(f"{model}: {sum(map(len, held.values()))} of {len(planned)} runs")
        if (comparison := compared(held)) is not None:
            for section in [
                *comparison_sections(comparison),
                Section("Besides", [Table(BESIDES, besides(comparison, held))]),
            ]:
                pages.append(Section(f"{model}: {section.heading}", section.blocks))
            picture = IMAGES / f"does_it_help_{model}.svg"
            write_file(picture, forest_plot(differences(comparison), xlabel="points, against plain QLoRA"))
            shown = f"![Every arm against plain QLoRA, in points](images/{picture.name})"
            text = filled(text, COMMAND, {model: f"{shown}\n\n{markdown_of(comparison, held)}"})
        tried = by_arm(every, [run for run in search_runs() if run[0] == model])
        if (comparison := compared(tried)) is not None:
            text = filled(text, COMMAND, {f"{model}, the search": markdown_of(comparison, tried)})
    if not pages:
        raise ValueError(f"results: {results} lacks {BASE} and {PLAIN} of every model ({'; '.join(counted)})")
    first, _ = next(iter(every.values()))
    pages.append(settings_section({"evaluation": first.settings, "versions": first.versions}))
    write_file(document, text.encode())
    page = write_report(output, "Does ShifCon help?", pages, subtitle="; ".join(counted))
    return f"{'; '.join(counted)}\n{page}\n{document}"


def by_arm(every: Runs, planned: Sequence[Run]) -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """arm → (evaluation, what is known of the run) of each of its runs there is, both in the order of the plan."""
    held: dict[str, list[tuple[Any, dict[str, Any]]]] = {arm: [] for _, arm, _ in planned}
    for run in planned:
        if run in every:
            held[run[1]].append(every[run])
    return {arm: found for arm, found in held.items() if found}


def compared(held: dict[str, list[tuple[Any, dict[str, Any]]]]) -> SystemComparison | None:
    """The arms against plain QLoRA; None as long as the base or plain QLoRA has no run."""
    if not {BASE, PLAIN} <= held.keys():
        return None
    return compare_results(
        {arm: {str(known["seed"]): result for result, known in found} for arm, found in held.items()},
        PLAIN,
        before=BASE,
    )


def differences(comparison: SystemComparison) -> dict[str, dict[str, Interval]]:
    """What the primary measure and its companion are, for every arm against plain QLoRA."""
    return {
        label: {arm: comparison.difference(arm, PLAIN, codes) for arm in comparison.contenders}
        for label, codes in ((f"mean of {', '.join(WEAK)}", list(WEAK)), (f"pivot {PIVOT}", [PIVOT]))
    }


def markdown_of(comparison: SystemComparison, held: dict[str, list[tuple[Any, dict[str, Any]]]]) -> str:
    """The document's tables of one model."""
    rows = []
    for arm in comparison.systems:
        row = [arm, str(len(held[arm]))]
        row += [percent(comparison.share(arm, codes)) for codes in (list(WEAK), [PIVOT])]
        compared = arm in comparison.contenders
        for codes in (list(WEAK), [PIVOT]):
            row.append(points(comparison.difference(arm, PLAIN, codes)) if compared else "–")
        rows.append(row)
    header = ["arm", "seeds", "weak languages", PIVOT, "weak, against plain", f"{PIVOT}, against plain"]
    by_language = [
        [arm, *(f"{100 * comparison.share(arm, [code]).estimate:.1f}" for code in (PIVOT, *WEAK))]
        for arm in comparison.systems
    ]
    return "\n\n".join(
        [
            table(header, rows),
            table(["right, %", PIVOT, *WEAK], by_language),
            table(BESIDES, besides(comparison, held)),
        ]
    )


BESIDES = [
    "arm",
    "perplexity ÷ plain, weak",
    f"… {PIVOT}",
    "MEXA, weak",
    "goes on in its language, weak",
    f"… {PIVOT}",
    "largest dose",
    "minutes of a core",
]


def besides(
    comparison: SystemComparison, held: dict[str, list[tuple[Any, dict[str, Any]]]]
) -> list[list[str]]:
    """What else was measured of every arm, a row each: language modelling, retrieval, dose and time."""
    rows = []
    for arm, found in held.items():
        ratios = [
            math.exp(comparison.log_perplexity(arm, PLAIN, codes).estimate) for codes in (list(WEAK), [PIVOT])
        ]
        mexa = [known["mexa"][code] for _, known in found for code in WEAK]
        middle = [curve[len(curve) // 2] for curve in mexa]
        shifted = [
            known for _, known in found if arm != BASE and arguments(known["model"], arm).get("shift", True)
        ]
        doses = [dose for known in shifted for both in known["dose"].values() for dose in both]
        rows.append(
            [
                arm,
                *(f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}" for ratio in ratios),
                f"{sum(middle) / len(middle):.2f}",
                *(_in_language(found, codes) for codes in (WEAK, [PIVOT])),
                _dose(max(doses)) if doses else "–",
                f"{_mean_seconds(found) / 60:.1f}",
            ]
        )
    return rows


def _dose(dose: float) -> str:
    return f"{dose:.2f}" if dose >= 0.01 else f"{dose:.5f}"


def _in_language(found: list[tuple[Any, dict[str, Any]]], codes: Sequence[str]) -> str:
    """The share of what can be told; of the runs in which it was looked at."""
    told = [
        each["in_language"]
        for _, known in found
        for code in codes
        for each in known.get("continued", {}).get(code, [])
        if each["in_language"] is not None
    ]
    return f"{100 * sum(told) / len(told):.0f} %" if told else "–"


def _mean_seconds(found: list[tuple[Any, dict[str, Any]]]) -> float:
    return sum(known["training_seconds"] for _, known in found) / len(found)


if __name__ == "__main__":
    main()
