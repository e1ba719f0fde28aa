"""Rows of a JSON Lines file or of a Hugging Face dataset, each with the place it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shifcon_fast.data.errors import DataError

_LANGUAGE_KEY = re.compile(r"[a-z]{2,3}")
_DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """One record and where it stands (``file.jsonl:12``, or ``owner/name[train] row 11``), for error messages."""

    where: str
    value: dict[str, Any]


def is_language(key: str, value: object) -> bool:
    """Whether a field is a sentence in some language: a two- or three-letter lower-case key with a string.

    The value decides too: ``"id": "Halo"`` is Indonesian, ``"id": 7`` and ``"row": 7`` are numbers of rows.
    """
    return isinstance(value, str) and _LANGUAGE_KEY.fullmatch(key) is not None


def check_text(value: object, where: str, what: str) -> str:
    """Return ``value`` if it is a string with something in it that UTF-8 can encode; raise DataError otherwise."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {_kind(value)}; wanted a string")
    if not value.strip():
        raise DataError(f"{where}: {what} is empty; wanted a sentence")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} holds half of a surrogate pair ({error.reason}); wanted text"
        ) from None
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} ({str(value)[:40]})"


def read_rows(source: str | Path) -> list[Row]:
    """Read every row of a JSON Lines file, a dataset folder or a Hugging Face dataset (``id[:config[:split]]``).

    The configuration may be left empty (``owner/name::validation``); the split is ``train`` unless given.

    Raises:
        DataError: the source does not exist, a line is not a JSON object, or there is no row at all.
    """
    if Path(source).is_file():
        rows = _read_json_lines(Path(source))
    elif isinstance(source, Path) and not source.is_dir():
        raise DataError(f"{source}: no such file; wanted a JSON Lines file")
    else:
        rows = _read_dataset(str(source))
    if not rows:
        raise DataError(f"{source}: holds no rows; wanted at least one")
    return rows


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                value = json.loads(text)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise DataError(
                    f"{where}: not valid JSON ({error}); wanted one JSON object a line"
                ) from error
            if not isinstance(value, dict):
                raise DataError(f"{where}: a JSON {type(value).__name__}; wanted an object")
            rows.append(Row(where, value))
    return rows


def _read_dataset(source: str) -> list[Row]:
    if Path(source).is_dir():
        name, config, split = source, None, "train"
    else:
        parts = source.split(":", 2)
        name, config, split = parts[0], (parts[1:2] or [""])[0] or None, (parts[2:3] or [""])[0] or "train"
    is_folder = Path(name).is_dir()
    looks_like_file = name.endswith((".jsonl", ".json", ".txt", ".csv", ".gz")) or name.startswith(
        (".", "/", "~")
    )
    if not is_folder and (looks_like_file or not _DATASET_ID.fullmatch(name)):
        raise DataError(f"{source}: no such file; wanted a JSON Lines file or a Hugging Face dataset id")

    import datasets  # slow to import, and files do not need it

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the builders and the cache raise a dozen unrelated types
        raise DataError(
            f"{source}: could not be read as a JSON Lines file (no such file) nor as a Hugging Face dataset "
            f"(id[:config[:split]], here config {config!r}, split {split!r}): {error}"
        ) from error
    if not all(isinstance(row, Mapping) for row in rows.select(range(min(1, len(rows))))):
        raise DataError(f"{source}: rows are not records; wanted named columns")
    return [Row(f"{name}[{split}] row {index}", dict(row)) for index, row in enumerate(rows)]
