"""Whatever ``Trainer`` takes as a data set, prepared: token ids, labels and a language id per example.

``datasets`` is not imported here: a data set of its is one only where somebody else has imported it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from torch.utils.data import Dataset

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction, parse_instruction, read_instructions
from shifcon_fast.data.row import Row
from shifcon_fast.data.rows import Source
from shifcon_fast.notices import warn_once
from shifcon_fast.training.batches.instruction_data import IGNORED, ExampleEncoder, InstructionDataset
from shifcon_fast.training.batches.language_column import PER_EXAMPLE, PER_TOKEN

logger = logging.getLogger(__name__)

Instructions = Source | Sequence[Instruction] | Dataset[Any]

_LENGTH = "_length"  # a column in passing
_FOR_MODEL = ("input_ids", "labels", "attention_mask", PER_EXAMPLE, PER_TOKEN)


def is_table(data: object) -> TypeGuard[Any]:
    """Whether this is a ``datasets.Dataset``."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, datasets.Dataset)


def is_stream(data: object) -> TypeGuard[Any]:
    """Whether this is a ``datasets.IterableDataset``."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, datasets.IterableDataset)


def column_names(data: Any) -> list[str]:
    """The columns of a table or a stream; those of a stream's first row where it does not say."""
    return list(data.column_names or next(iter(data), {}))


def languages_of(data: Any, column: str) -> list[str]:
    """The codes in a source of instructions, in the order of their first rows; none where nobody can tell yet."""
    if is_table(data):
        return [code for code in data.unique(column) if code] if column in data.column_names else []
    if isinstance(data, Sequence) and not isinstance(data, str):
        return list(dict.fromkeys(each.language for each in data if isinstance(each, Instruction)))
    return []


def prepare(
    data: Instructions,
    encoder: ExampleEncoder,
    *,
    language_column: str = "lang",
    wants_language: bool = True,
    own_collator: bool = False,
) -> Dataset[Any]:
    """A data set with ``input_ids``, ``labels`` and ``language_id`` (or ``language_ids``, one per token).

    Args:
        data: instructions in any form that ``read_instructions`` takes. A ``datasets.Dataset`` is tokenised by its
            ``map`` (memory-mapped and cached where it is), an ``IterableDataset`` as it is read. Tokenised already
            (with ``input_ids``), it keeps its columns, but for the language's. Torch data sets pass as they are.
        encoder: how.
        language_column: of a code per row.
        wants_language: refuse tokenised data that does not say its language.
        own_collator: somebody's own collator makes the batches, and knows what to do with other columns and with
            data without labels.

    Raises:
        DataError: as :meth:`ExampleEncoder.encode`; a column is missing; nothing is left.
    """
    if not (is_table(data) or is_stream(data)):
        if isinstance(data, Dataset):
            return data
        return InstructionDataset.of(read_instructions(data, language_column), encoder)
    if getattr(data, "_format_type", None) == "custom":
        raise DataError(
            "the given data has a transform (with_transform), which tokenising would run once and for all; wanted "
            "data.map(...), or a torch Dataset that gives input_ids, labels and language_id"
        )
    names = column_names(data)
    if not names:
        raise DataError("the given data holds no rows; wanted at least one")
    if "input_ids" in names:
        language = _language_source(names, language_column, wants_language)
        _tell(names, language_column, own_collator)
        labels = "given" if "labels" in names else "none" if own_collator else "made"
        rows: _Rows = _TokenizedRows(encoder, language, streamed=is_stream(data), labels=labels)
    else:
        rows = _Rows(encoder, language_column, streamed=is_stream(data))
    settings: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": names}
    if is_stream(data):
        return data.map(rows, **settings).remove_columns([_LENGTH])
    whole = data.with_format(None)
    prepared = whole.map(rows, desc="Tokenizing", **settings)
    lengths = prepared.with_format("numpy")[_LENGTH][:] if len(prepared) else []
    dropped = len(whole) - len(prepared)
    encoder.report(len(whole), dropped + sum(int(length) > encoder.max_length for length in lengths))
    return prepared.remove_columns([_LENGTH])


def _language_source(names: Sequence[str], column: str, wanted: bool) -> str | None:
    """The column that tells the language; None where nothing does and nothing needs to."""
    found = next((name for name in (PER_TOKEN, PER_EXAMPLE, column) if name in names), None)
    if found is None and wanted:
        raise DataError(
            f"the given data is tokenised and has {', '.join(map(repr, names))}; the shift needs the language of "
            f"each row: wanted a code in {column!r} (language_column), or {PER_EXAMPLE!r}, an id as "
            f"handle.language_ids gives it, or {PER_TOKEN!r}, one id per token; shift=False trains without"
        )
    return found


def _tell(names: Sequence[str], language_column: str, own_collator: bool) -> None:
    if own_collator:
        return
    if "labels" not in names:
        logger.warning(
            "The given data is tokenised and has no 'labels': every token is learnt, prompts included. Wanted "
            "labels, with %d for what is not to be learnt.",
            IGNORED,
        )
    if unused := [name for name in names if name not in (*_FOR_MODEL, language_column)]:
        logger.warning("Columns of the tokenised data that are not used: %s", ", ".join(unused))


class _Rows:
    """What ``datasets.map`` calls with a batch of rows: some are cut, some left out."""

    def __init__(self, encoder: ExampleEncoder, language: str | None, *, streamed: bool) -> None:
        self._encoder, self._language, self._streamed = encoder, language, streamed

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        made = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            row = Row(f"row {index} (from 0) of the given rows", dict(zip(batch, values, strict=True)))
            example, length = self._make(row)
            if self._streamed and length > self._encoder.max_length:
                done = "left out" if self._encoder.too_long == "drop" else "cut at the end"
                warn_once(
                    f"Of the streamed instructions some have more than {self._encoder.max_length} tokens "
                    f"({self._encoder.limit}): {done}."
                )
            if example is not None:
                made.append(dict(example) | {_LENGTH: length})
        return {name: [self._compact(each[name]) for each in made] for name in self._columns(batch)}

    def _make(self, row: Row) -> tuple[Any, int]:
        """The row prepared, or None, and its length uncut."""
        assert self._language is not None
        return self._encoder.encode(parse_instruction(row, self._language))

    def _columns(self, batch: Mapping[str, list[Any]]) -> list[str]:
        return ["input_ids", "labels", PER_EXAMPLE, _LENGTH]

    def _compact(self, value: Any) -> Any:
        """Four bytes a token in a table; a stream's rows stay lists, which every collator knows."""
        is_ids = isinstance(value, list) and value and isinstance(value[0], int)
        return np.asarray(value, dtype=np.int32) if is_ids and not self._streamed else value


class _TokenizedRows(_Rows):
    """The same for rows that are token ids already."""

    def __init__(self, *args: Any, labels: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._labels = labels  # "given", "made" or "none"

    def _make(self, row: Row) -> tuple[Any, int]:
        value = row.value
        length = len(value["input_ids"])
        kept = self._encoder.fit(value["input_ids"], value.get("labels", value["input_ids"]), row.where)
        if kept is None:
            return None, length
        tokens = len(kept[0])
        made = {
            name: each[:tokens] if isinstance(each, list) and len(each) == length else each
            for name, each in value.items()
        }
        made |= {"input_ids": kept[0]} | ({} if self._labels == "none" else {"labels": kept[1]})
        if self._language == PER_TOKEN and isinstance(value[PER_TOKEN], list):
            return made, length
        return made | {PER_EXAMPLE: self._language_id(row)}, length

    def _language_id(self, row: Row) -> int:
        given = row.value[self._language] if self._language else -1
        if isinstance(given, int):
            return given
        if given is None:
            raise DataError(f"{row.where}: {self._language!r} is null; wanted a language")
        return self._encoder.id_of(str(given), row.where)

    def _columns(self, batch: Mapping[str, list[Any]]) -> list[str]:
        per_token = self._language == PER_TOKEN and isinstance(batch[PER_TOKEN][0], list)
        own = [name for name in batch if per_token or name != self._language]
        made = [] if per_token else [PER_EXAMPLE]
        return [*own, *(["labels"] if self._labels == "made" else []), *made, _LENGTH]
