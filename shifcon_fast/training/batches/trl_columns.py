"""The language column on its way through TRL's trainers, which drop what they do not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shifcon_fast.data.errors import DataError
from shifcon_fast.training.batches.language_column import PER_EXAMPLE, PER_TOKEN
from shifcon_fast.training.batches.prepared_data import column_names


def add_language_ids(
    dataset: Any, column: str, language_id: Callable[[str], int], *, wanted: bool = True
) -> Any:
    """A data set of ``datasets`` with a column ``language_id``; unchanged where it or ``language_ids`` is there.

    Args:
        dataset: a ``Dataset`` or ``IterableDataset``.
        column: that holds the code of each row.
        language_id: the id of a code; ValueError for an unknown one.
        wanted: refuse data without the column, whose rows are -1 otherwise.

    Raises:
        DataError: the column is missing, a row has no code, or one that is not known.
    """
    names = column_names(dataset)
    if PER_EXAMPLE in names or PER_TOKEN in names:
        return dataset
    if column not in names and wanted:
        raise DataError(
            f"the given data has {', '.join(map(repr, names))}; the shift needs the language of each row: wanted a "
            f"code in {column!r} (language_column), or {PER_EXAMPLE!r}, an id as handle.language_ids gives it"
        )
    return dataset.map(_LanguageIds(column, language_id), batched=True, with_indices=True)


class _LanguageIds:
    """What ``datasets.map`` calls with a batch of rows."""

    def __init__(self, column: str, language_id: Callable[[str], int]) -> None:
        self._column, self._language_id = column, language_id

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[int]]:
        if self._column not in batch:
            return {PER_EXAMPLE: [-1] * len(indices)}
        return {PER_EXAMPLE: list(map(self._id, batch[self._column], indices))}

    def _id(self, code: str | None, index: int) -> int:
        where = f"row {index} (from 0) of the given rows"
        if code is None:
            raise DataError(f"{where}: {self._column!r} is null; wanted a language")
        try:
            return self._language_id(code)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error


class LanguageColumns:
    """Has a TRL trainer keep the language columns of its data sets. A mixin, in front of the trainer."""

    _signature_columns: list[str] | None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*columns, PER_EXAMPLE, PER_TOKEN]))
