"""Crash-safe folders: a reader sees the state before an update or the state after it, never a mixture.

An update is staged in a hidden sub-folder and committed by one atomic ``os.replace`` of a small record; only
then are the staged files moved into place. Whoever reads the folder next calls :func:`settle`, which rolls a
committed update forward; the next writer discards what was never committed (write-ahead logging, as in a
database). One writer at a time; readers may come at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_STAGING_PREFIX = ".staging-"
_COMMIT_RECORD = ".commit.json"


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # directories cannot be opened for fsync elsewhere
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as UTF-8 JSON, atomically: the old file stays whole until the new one is on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        _sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object; ``what`` says in the error what the file should have been.

    Raises:
        ValueError: the file is missing, is not JSON, or does not hold an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted {what}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); wanted {what}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}; wanted {what}, an object")
    return value


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def staged_update(folder: str | Path) -> Iterator[Path]:
    """Yield an empty staging folder; on success its files replace those of ``folder`` all together.

    Files of ``folder`` that the update does not write stay as they are. If the body raises (a full disk,
    Ctrl-C) or the process is killed at any moment, readers that call :func:`settle` see the previous state.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    for leftover in folder.glob(f"{_STAGING_PREFIX}*"):  # never committed: its writer died
        shutil.rmtree(leftover, ignore_errors=True)
    staging = folder / f"{_STAGING_PREFIX}{uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        files = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        for name in files:
            _sync_file(staging / name)
        _sync_folder(staging)
        write_json(folder / _COMMIT_RECORD, {"staging": staging.name, "files": files})  # the commit point
        _sync_folder(folder)
    except BaseException:
        if not (folder / _COMMIT_RECORD).exists():
            shutil.rmtree(staging, ignore_errors=True)
        raise
    settle(folder)


def settle(folder: str | Path) -> None:
    """Roll a committed :func:`staged_update` forward where its writer died before the files were moved.

    Does nothing where no update was interrupted, so that read-only folders can be read. Safe to call while
    another process settles the same folder.

    Raises:
        ValueError: the commit record is damaged or names a file outside of the folder.
    """
    folder = Path(folder)
    record = folder / _COMMIT_RECORD
    if not record.exists():
        return
    commit = read_json(record, "the commit record of an interrupted update")
    staging = folder / Path(commit["staging"]).name
    for name in commit["files"]:
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{record}: names {name!r}, which lies outside of the folder; delete the record")
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # moved already, by the roll-forward that was itself interrupted
            os.replace(staging / name, target)
    _sync_folder(folder)
    record.unlink(missing_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
