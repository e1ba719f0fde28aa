"""Rows of a data source, whatever it comes in, each with the place it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.files import FILE_KINDS, read_file
from shifcon_fast.data.row import Row
from shifcon_fast.extras import needed_for

Source = str | Path | Iterable[Mapping[str, Any]]
"""A file, a dataset folder, a Hugging Face dataset id, or rows in memory (dataset, DataFrame, list of dicts)."""

_DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_NAME = re.compile(
    r"\.(jsonl?|ndjson|txt|csv|tsv|tab|parquet|arrow|xlsx?|zip|gz|bz2|xz|zst)$", re.IGNORECASE
)


def source_name(source: object) -> str:
    """What to call a source in messages."""
    return str(source) if isinstance(source, (str, Path)) else "the given rows"


def read_rows(source: Source) -> list[Row]:
    """Read every row of a source; the one reader of everything.

    Args:
        source: a file (see :mod:`shifcon_fast.data.files`); a folder with such files, or one that ``datasets`` has
            saved to disk; a Hugging Face dataset (``id[:config[:split]]``; the configuration may be left empty, as
            in ``owner/name::validation``, and the split is ``train`` unless given); a ``datasets.Dataset`` or
            ``IterableDataset``, a pandas DataFrame, or any iterable of mappings.

    Raises:
        DataError: the source does not exist, is of another kind or damaged, or holds no row at all.
    """
    if not isinstance(source, (str, Path)):
        rows = _rows_in_memory(source)
    elif not str(source):
        raise DataError("the name of the data is empty; wanted a file or a Hugging Face dataset id")
    elif Path(source).is_file():
        rows = read_file(Path(source))
    elif isinstance(source, Path) and not source.is_dir():
        raise DataError(f"{source}: no such file; wanted {FILE_KINDS}")
    else:
        rows = _read_dataset(str(source))
    if not rows:
        raise DataError(f"{source_name(source)}: holds no rows; wanted at least one")
    return rows


def _rows_in_memory(source: Any) -> list[Row]:
    if isinstance(source, Mapping):
        raise DataError(
            f"the given rows are a {type(source).__name__} of {', '.join(map(repr, source)) or 'nothing'}; wanted "
            "the rows themselves: one split of a DatasetDict (dataset['train']), or a list of dicts"
        )
    if hasattr(source, "to_dict") and hasattr(
        source, "columns"
    ):  # a pandas DataFrame iterates over its columns
        source = source.to_dict("records")
    try:
        values = iter(source)
    except TypeError:
        raise DataError(
            f"the given data is a {type(source).__name__}; wanted a file name, a dataset id, a datasets.Dataset or "
            "a list of dicts"
        ) from None
    rows = []
    for index, value in enumerate(values):
        where = f"row {index} (from 0) of the given rows"
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: got a {type(value).__name__}; wanted a dict with named fields")
        rows.append(Row(where, dict(value)))
    return rows


def _read_dataset(source: str) -> list[Row]:
    if Path(source).is_dir():
        name, config, split = source, None, "train"
    else:
        parts = source.split(":", 2)
        name, config, split = parts[0], (parts[1:2] or [""])[0] or None, (parts[2:3] or [""])[0] or "train"
    is_folder = Path(name).is_dir()
    looks_like_file = _FILE_NAME.search(name) or name.startswith((".", "/", "~"))
    if not is_folder and (looks_like_file or not _DATASET_ID.fullmatch(name)):
        raise DataError(f"{source}: no such file; wanted {FILE_KINDS}, or a Hugging Face dataset id")

    with needed_for(f"{source} is no file, and a Hugging Face dataset"):
        import datasets  # slow to import, and files do not need it

    try:
        if is_folder and (Path(name) / "state.json").is_file():  # what Dataset.save_to_disk writes
            rows = datasets.load_from_disk(name)
        elif is_folder and (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[split]
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the builders and the cache raise a dozen unrelated types
        raise DataError(
            f"{source}: could not be read as a file (no such file) nor as a Hugging Face dataset "
            f"(id[:config[:split]], here config {config!r}, split {split!r}): {error}"
        ) from error
    if not all(isinstance(row, Mapping) for row in rows.select(range(min(1, len(rows))))):
        raise DataError(f"{source}: rows are not records; wanted named columns")
    return [Row(f"{name}[{split}] row {index}", dict(row)) for index, row in enumerate(rows)]
