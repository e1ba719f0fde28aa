"""Checkpoints that exist whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_STAGING = ".saving-"
_REPLACED = ".replaced-"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(run: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. Leftovers of interrupted saves are not among them."""
    run = Path(run)
    found = [
        (int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if path.is_dir()]


def staging_folder(run: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is written before :func:`publish`."""
    return Path(run) / f"{_STAGING}checkpoint-{step}"


def clean_up(run: str | Path) -> None:
    """Remove what interrupted saves left behind, and bring back a checkpoint that was being replaced."""
    run = Path(run)
    for old in run.glob(f"{_REPLACED}*"):
        place = run / old.name.removeprefix(_REPLACED)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, place)
    for leftover in run.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def publish(staging: Path) -> Path:
    """Move a fully written checkpoint into place; from here on it exists. Returns its folder."""
    _sync(staging)
    place = staging.with_name(staging.name.removeprefix(_STAGING))
    replaced = staging.with_name(f"{_REPLACED}{place.name}")
    if place.exists():
        os.replace(place, replaced)
    os.replace(staging, place)
    shutil.rmtree(replaced, ignore_errors=True)
    return place


def rotate(run: str | Path, limit: int | None, keep: Iterable[str | Path | None]) -> None:
    """Delete the oldest checkpoints beyond ``limit``, but none of ``keep`` (the best one)."""
    if not limit or limit <= 0:
        return
    kept = {Path(path).resolve() for path in keep if path}
    checkpoints = list_checkpoints(run)
    surplus = [path for path in checkpoints[:-1] if path.resolve() not in kept]
    for path in surplus[: max(0, len(checkpoints) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have the disk hold every byte before the rename that makes them count."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
