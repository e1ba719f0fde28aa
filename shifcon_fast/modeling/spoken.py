"""The languages that a model is told to take rows to be in, where a call passes no ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shifcon_fast.space.language_shift import LanguageShift

AUTO = "auto"
NO_ROUTER = (
    'language: got "auto"; the shift has no router, which is estimated with the subspaces of a stable space: '
    "profile again without subspaces=False, or say the language"
)


@dataclass(frozen=True, eq=False)
class Spoken:
    """One language for all rows, one for each row, or :data:`AUTO`: rows find their own.

    Attributes:
        languages: as they were said, but spelt as the first shift that knows them spells them.
        is_auto: whether rows find their own.
        is_single: whether one stands for all rows.
        ids: for each shift, (n,) int64, the languages' ids, or None where it does not know one of them. Tensors, so
            that compiled code does not depend on which languages they are.
        still: the shifts of which only the pivot is spoken.
    """

    languages: str | tuple[str, ...]
    is_auto: bool
    is_single: bool
    ids: tuple[Tensor | None, ...]
    still: frozenset[int] = frozenset()

    def rows(self, which: int, shift: LanguageShift, batch: int) -> Tensor | None:
        """(batch,) int64 on the CPU, ids of the shift, which is number ``which``; None where all are the pivot's.

        Raises:
            ValueError: a language that this shift does not know; a batch that is no multiple of the languages.
        """
        ids = self.ids[which] if which < len(self.ids) else None  # added since
        if ids is None:
            ids = _ids_of(self.languages, shift)
        if which in self.still:
            return None
        if self.is_single:
            return ids.expand(batch)
        if batch % len(ids):
            raise ValueError(
                f"language: {len(ids)} are in use for a batch of {batch} rows; wanted one per row (times the beams "
                "or num_return_sequences of generate), or a single one for all"
            )
        return ids.repeat_interleave(batch // len(ids))


def spoken(languages: str | Sequence[str], shifts: Sequence[LanguageShift]) -> Spoken:
    """Check what users say.

    Raises:
        ValueError: no language, one that no shift knows, or ``"auto"`` where no shift has a router.
    """
    if languages == AUTO:
        if not any(shift.router is not None for shift in shifts):
            raise ValueError(NO_ROUTER)
        return Spoken(AUTO, is_auto=True, is_single=True, ids=(None,) * len(shifts))
    said = languages if isinstance(languages, str) else tuple(languages)
    if not said:
        raise ValueError("language: got none; wanted a language code, or one per row")
    if AUTO in said and not isinstance(said, str):
        raise ValueError(f"language: got {list(said)}; wanted {AUTO!r} alone, which finds each row's own")
    errors: list[ValueError] = []
    ids: list[Tensor | None] = []
    for shift in shifts:
        try:
            ids.append(_ids_of(said, shift))
        except ValueError as error:
            errors.append(error)
            ids.append(None)
    if len(errors) == len(shifts):
        raise errors[0]
    first = next(index for index, each in enumerate(ids) if each is not None)
    spelt = tuple(shifts[first].languages[index] for index in _ids_of(said, shifts[first]).tolist())
    single = isinstance(said, str)
    still = frozenset(
        number
        for number, (each, shift) in enumerate(zip(ids, shifts, strict=True))
        if each is not None and not shift.moves_pivot and bool((each == shift.pivot_id).all())
    )
    return Spoken(spelt[0] if single else spelt, is_auto=False, is_single=single, ids=tuple(ids), still=still)


def _ids_of(languages: str | tuple[str, ...], shift: LanguageShift) -> Tensor:
    codes = (languages,) if isinstance(languages, str) else languages
    return torch.tensor([shift.language_id(code) for code in codes], dtype=torch.long)
