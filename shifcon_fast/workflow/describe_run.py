"""``shifcon card``: the model card of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shifcon_fast.evaluation.card_tables import evaluation_tables
from shifcon_fast.evaluation.comparison import FILE_NAME as COMPARISON
from shifcon_fast.evaluation.comparison import PairedComparison
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.export.model_card import README, CardOptions, is_written_by_hand
from shifcon_fast.extras import MissingExtraError
from shifcon_fast.storage import read_json, write_file
from shifcon_fast.training.run.run_card import RunCard, read_card
from shifcon_fast.training.run.run_folder import LOG
from shifcon_fast.training.run.run_readme import write_readme
from shifcon_fast.training.run.shift_file import read_shift

LOSS_PLOT = "loss.png"


def describe(
    run: Path,
    *,
    evaluation: Path | None = None,
    base_model: str | None = None,
    repository: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    overwrite: bool = False,
) -> str:
    """Write a run's ``README.md`` and a picture of its losses; the model is not loaded.

    Args:
        run: its folder.
        evaluation: folder of ``shifcon evaluate``, for the tables.
        base_model, repository, license, datasets, tags: see :class:`.CardOptions`.
        overwrite: also over a card that a person has written or changed.

    Raises:
        ValueError: no run; a card to keep; an evaluation of a model that is shifted otherwise.
    """
    card = read_card(run)
    if is_written_by_hand(run / README) and not overwrite:
        raise ValueError(
            f"{run / README}: was written by hand, or changed to be kept; --overwrite writes it anew"
        )
    options = CardOptions(
        base_model=base_model,
        repository=repository,
        license=license,
        datasets=tuple(datasets),
        tags=tuple(tags),
        evaluation=_tables(evaluation, card) if evaluation is not None else "",
    )
    notes = _draw_losses(run)
    path = write_readme(run, card, read_shift(run, card), options=options)
    return "\n".join([*notes, f"written to {path}"])


def _tables(folder: Path, card: RunCard) -> str:
    result = EvaluationResult.load(folder)
    area = card["area"]
    measured = None if result.area is None else {name: result.area[name] for name in ("forward", "backward")}
    if measured != area or (result.area and card["shift"] and result.area["alpha"] != card["alpha"]):
        raise ValueError(
            f"evaluation: {folder} is of {result.model}, shifted at {result.area}; the run is at {area}, "
            f"alpha {card['alpha']:g}: evaluate it"
        )
    compared = (folder / COMPARISON).is_file()
    return evaluation_tables(result, PairedComparison.load(folder) if compared else None)


def _draw_losses(run: Path) -> list[str]:
    """Draw what the run has logged; a line that says why not, where that is a missing package."""
    log: Mapping[str, Any] = read_json(run / LOG, "the log of a run") if (run / LOG).is_file() else {}
    steps = log.get("steps", [])
    if len(steps) < 2 or not any("loss_generation" in row for row in steps):
        return []
    try:
        from shifcon_fast.evaluation.plots import loss_plot

        write_file(run / LOSS_PLOT, loss_plot({"run": [steps]}, file_format="png"))
    except MissingExtraError as error:
        return [f"the picture is left out: {error}"]
    return []
