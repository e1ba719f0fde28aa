"""Write reports: any sections as one page, or whatever the folder of a run, an evaluation or a profile holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from shifcon_fast.evaluation.choice_section import choice_section
from shifcon_fast.evaluation.comparison import FILE_NAME as COMPARISON
from shifcon_fast.evaluation.comparison import PairedComparison
from shifcon_fast.evaluation.page import Section, render_page
from shifcon_fast.evaluation.result import FILE_NAME, EvaluationResult
from shifcon_fast.evaluation.sections import (
    accuracy_section,
    area_section,
    perplexity_section,
    retrieval_section,
    settings_section,
    training_section,
)
from shifcon_fast.evaluation.sweep_section import sweep_section
from shifcon_fast.evaluation.system_comparison import LoggedStep
from shifcon_fast.space.area import Area, recommend_area
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import FILE_NAME as SWEEP
from shifcon_fast.space.sweep_result import AreaSweep
from shifcon_fast.storage import read_json, write_file

_SPACE, _AREA, _CARD, _LOG = "language_space.json", "area.json", "shifcon.json", "training_log.json"


def write_report(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    footer: str = "Written by shifcon_fast.",
) -> Path:
    """Write the page and return where it is.

    Args:
        path: a folder (then ``report.html`` in it) or the ``.html`` file itself; folders are made. The file is
            replaced in one step: a reader sees the old page or the new one.
        sections: sections without blocks are left out.
    """
    path = Path(path)
    target = path if path.suffix == ".html" else path / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, render_page(title, sections, subtitle=subtitle, footer=footer).encode())
    return target


def report_folder(folder: str | Path, output: str | Path | None = None) -> Path:
    """One page of what a folder holds; which files it may hold is in ``docs/evaluation.md``.

    Args:
        folder: of a run (``shifcon train``), an evaluation (``shifcon evaluate``) or a profile
            (``shifcon profile``).
        output: the HTML file or a folder for it; None puts ``report.html`` beside what it shows.

    Raises:
        ValueError: no such folder, nothing in it to report on, or a file that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; wanted that of a run, an evaluation or a profile")
    held = _read(folder)
    sections = [
        _area(held),
        _sweep(held),
        _training(held),
        *_measured(held),
        settings_section(_settings(held)),
    ]
    return write_report(
        output if output is not None else folder, _title(held, folder), sections, subtitle=_subtitle(held)
    )


class Boundaries(TypedDict):
    """A layer area [forward, backward)."""

    forward: int
    backward: int


@with_config(ConfigDict(extra="allow"))
class RunCard(TypedDict, total=False):
    """What a report says of a run's card; the rest is listed as it is."""

    base_model: str
    area: Boundaries | None
    training: dict[str, Any]
    versions: dict[str, str]


class TrainingLog(TypedDict):
    """``training_log.json``."""

    steps: list[LoggedStep]
    evaluations: list[dict[str, Any]]


@dataclass(frozen=True)
class _Held:
    """What a folder holds; None or empty for what is not there."""

    space: LanguageSpace | None
    area: Area | None
    card: RunCard
    log: list[LoggedStep]
    result: EvaluationResult | None
    other: EvaluationResult | None
    against: PairedComparison | None
    sweep: AreaSweep | None


def _read(folder: Path) -> _Held:
    profile = folder / "profile" if (folder / "profile" / _SPACE).is_file() else folder
    space = LanguageSpace.load(profile) if (profile / _SPACE).is_file() else None
    area = read_json(folder / _AREA, "a layer area", Area) if (folder / _AREA).is_file() else None
    card: RunCard = {}
    if (folder / _CARD).is_file():
        card = read_json(folder / _CARD, "the card of a run", RunCard)
    log: list[LoggedStep] = []
    if (folder / _LOG).is_file():
        log = read_json(folder / _LOG, "a training log", TrainingLog)["steps"]
    result = EvaluationResult.load(folder) if (folder / FILE_NAME).is_file() else None
    other_file = folder / "against" / FILE_NAME
    other = EvaluationResult.load(other_file) if other_file.is_file() else None
    against = PairedComparison.load(folder) if (folder / COMPARISON).is_file() else None
    sweep = AreaSweep.load(folder) if (folder / SWEEP).is_file() else None
    if space is None and not log and result is None and sweep is None:
        raise ValueError(
            f"{folder}: holds none of {_SPACE}, {_LOG}, {FILE_NAME} and {SWEEP}; wanted the folder of a run, an "
            "evaluation, a profile or a sweep"
        )
    return _Held(space, area, card, log, result, other, against, sweep)


def _area(held: _Held) -> Section:
    space = held.space
    if space is None or not space.bases:
        return Section("Layer area")
    if held.sweep is not None and held.sweep.areas:
        area = recommend_area(space, sweep=held.sweep, alpha=held.sweep.alphas[0])
    else:
        area = held.area or recommend_area(space)
    trained = held.card.get("area")
    return area_section(space, area, chosen=(trained["forward"], trained["backward"]) if trained else None)


def _sweep(held: _Held) -> Section:
    return sweep_section(held.sweep) if held.sweep is not None and held.sweep.areas else Section("Sweep")


def _training(held: _Held) -> Section:
    return training_section({"run": [held.log]}) if held.log else Section("Training")


def _measured(held: _Held) -> list[Section]:
    if held.result is None:
        return []
    return [
        accuracy_section(held.result, held.other, held.against),
        choice_section(held.result, held.other, held.against),
        retrieval_section(held.result, held.other),
        perplexity_section(held.result, held.against),
    ]


def _settings(held: _Held) -> dict[str, dict[str, Any]]:
    card = {name: value for name, value in held.card.items() if name not in ("training", "versions")}
    groups: dict[str, dict[str, Any]] = {"run": card, "training": held.card.get("training", {})}
    if held.result is not None:
        groups["evaluation"] = {"model": held.result.model, **held.result.settings}
    if held.space is not None:
        groups["language space"] = {
            "languages": held.space.languages,
            "pivot": held.space.pivot,
            "sentences": held.space.counts,
        }
    versions = held.card.get("versions") or (held.result.versions if held.result else {})
    return {**groups, "versions": versions}


def _title(held: _Held, folder: Path) -> str:
    if held.result is not None:
        return f"Evaluation of {Path(held.result.model).name}"
    return f"Training run {folder.resolve().name}" if held.log else f"Language space {folder.resolve().name}"


def _subtitle(held: _Held) -> str:
    if held.result is not None and held.against is not None:
        return f"Compared with {held.against.against} on the same sentences and questions."
    if held.card.get("base_model"):
        return f"Fine-tuned from {held.card['base_model']}."
    return ""
