"""``shifcon compare``: any number of evaluations side by side, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shifcon_fast.evaluation.report import write_report
from shifcon_fast.evaluation.result import FILE_NAME, EvaluationResult
from shifcon_fast.evaluation.sections import comparison_sections, settings_section
from shifcon_fast.evaluation.system_comparison import compare_results
from shifcon_fast.evaluation.systems_table import systems_table
from shifcon_fast.training.run.checkpoints import CARD

SYSTEMS_FILE = "systems.json"
_EVALUATION = "evaluation"


def compare_runs(
    evaluations: Sequence[str], output: Path, *, baseline: str | None = None, before: str | None = None
) -> str:
    """Compare evaluations on the same questions; write ``report.html`` and ``systems.json``.

    Args:
        evaluations: ``NAME=FOLDER``, or ``FOLDER``, which is called by its own name. Folders of
            ``shifcon evaluate``, or of runs that hold one as ``evaluation``. A name that is there several times is
            one system with several seeds, in the same order of seeds for all systems.
        baseline: the system that the others are measured against; None for the first.
        before: an untrained system, which is shown and not measured against the baseline.

    Returns:
        A table for the terminal.

    Raises:
        ValueError: fewer than two systems, an unknown baseline, a folder without an evaluation, or evaluations of
            other questions.
    """
    results: dict[str, list[EvaluationResult]] = {}
    read: set[Path] = set()
    for given in evaluations:
        name, folder = _named(given)
        if folder.resolve() in read:
            raise ValueError(f"evaluations: {folder} is there twice; wanted each folder once")
        read.add(folder.resolve())
        results.setdefault(name, []).append(EvaluationResult.load(_evaluation_in(folder)))
    if len(results) < 2:
        raise ValueError(f"evaluations: got only {', '.join(results) or 'none'}; wanted two systems or more")
    for option, system in (("baseline", baseline), ("before", before)):
        if system is not None and system not in results:
            raise ValueError(f"{option}: got {system!r}; wanted one of {', '.join(results)}")
    baseline = baseline or next(name for name in results if name != before)
    comparison = compare_results(results, baseline, before=before)
    comparison.save(output / SYSTEMS_FILE)
    settings = {name: {"model": each[0].model, **(each[0].area or {})} for name, each in results.items()}
    first = next(iter(results.values()))[0]
    page = write_report(
        output,
        f"{', '.join(name for name in results if name != baseline)} against {baseline}",
        [
            *comparison_sections(comparison),
            settings_section({**settings, "evaluation": first.settings, "versions": first.versions}),
        ],
    )
    return f"{systems_table(comparison)}\n\nwritten to {page}"


def _named(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    if not equals or Path(given).is_dir():  # a folder may have the sign in its name
        return Path(given).resolve().name, Path(given)
    if not name or not folder:
        raise ValueError(f"evaluations: got {given!r}; wanted NAME=FOLDER, or a folder")
    return name, Path(folder)


def _evaluation_in(folder: Path) -> Path:
    if (folder / FILE_NAME).is_file():
        return folder
    if (folder / _EVALUATION / FILE_NAME).is_file():
        return folder / _EVALUATION
    kind = "a run, not evaluated yet" if (folder / CARD).is_file() else "no folder of `shifcon evaluate`"
    raise ValueError(
        f"{folder}: {kind}; wanted one with {FILE_NAME}. Make it: shifcon evaluate --model {folder} "
        f"--questions FILE --output {folder / _EVALUATION}"
    )
