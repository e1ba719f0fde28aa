"""The checkpoints of a run: folders ``checkpoint-N`` that count as long as they have a card (see ``storage``)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from typing_extensions import TypedDict

from shifcon_fast.storage import read_json, remove

CARD = "shifcon.json"  # of a run folder and of each of its checkpoints
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(run: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. What an interrupted save left behind is not among them."""
    run = Path(run)
    found = [
        (int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if (path / CARD).is_file()]


def last_checkpoint(run: str | Path) -> Path:
    """The newest whole checkpoint of a run; ValueError where there is none."""
    found = list_checkpoints(run)
    if not found:
        raise ValueError(f"resume: {run} has no checkpoint; start without --resume")
    return found[-1]


class TrainerStateFile(TypedDict):
    """``trainer_state.json``: what resuming reads of it."""

    global_step: int
    max_steps: int
    log_history: list[dict[str, Any]]
    best_global_step: int | None
    best_model_checkpoint: str | None
    stateful_callbacks: dict[str, Any]


def read_trainer_state(checkpoint: Path) -> TrainerStateFile:
    """Check what ``Trainer`` is about to read without checks of its own.

    Raises:
        ValueError: not a trainer's state, or one of another version of transformers.
    """
    path = checkpoint / TRAINER_STATE_NAME
    what = "the state of a trainer"
    if unknown := read_json(path, what).keys() - {each.name for each in fields(TrainerState)}:
        raise ValueError(f"{path}: this version of transformers does not know {', '.join(sorted(unknown))}")
    return read_json(path, what, TrainerStateFile)


def rotate(run: str | Path, limit: int | None, keep: Iterable[str | Path | None]) -> None:
    """Delete the oldest checkpoints beyond ``limit``, but none of ``keep`` (the best one)."""
    if not limit or limit <= 0:
        return
    kept = {Path(path).resolve() for path in keep if path}
    checkpoints = list_checkpoints(run)
    surplus = [path for path in checkpoints[:-1] if path.resolve() not in kept]
    for path in surplus[: max(0, len(checkpoints) - limit)]:
        remove(path, CARD)
