"""What a language's shift adds, and where: the constants that every export writes down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from torch import Tensor

from shifcon_fast.modeling.architectures import locate_decoder

_LONGEST_NAME = 200  # bytes; file systems take 255, and an ending comes after it


@dataclass(frozen=True)
class ShiftVectors:
    """One language's shift.

    Attributes:
        language: its code, as the run writes it.
        pivot: the code of the language that it is shifted toward.
        at: boundary → (d,) float32 on the CPU, what is added to every token there; alpha is in it.
        num_blocks: L.
        hidden_size: d.
        model_type: ``config.model_type`` of the decoder.
    """

    language: str
    pivot: str
    at: Mapping[int, Tensor]
    num_blocks: int
    hidden_size: int
    model_type: str

    @property
    def file_stem(self) -> str:
        """The code as the name of a file or folder: no separator, not hidden, never a path."""
        return file_stem(self.language)

    def refuse_below(self, boundary: int, target: str, why: str, advice: str) -> None:
        """Raise where a boundary lies before the first that a target can reach.

        Raises:
            ValueError: with the boundary, the reason and what to do.
        """
        if min(self.at) < boundary:
            raise ValueError(
                f"{target}: the run shifts at boundary {min(self.at)}; wanted {boundary} or later, "
                f"since {why}. {advice}"
            )


def shift_vectors(model: Any, language: str) -> ShiftVectors:
    """What an attached model adds to rows of a language.

    Args:
        model: attached, as ``shifcon_fast.load`` returns it.
        language: a code in any form (``swh_Latn`` for ``sw``).

    Raises:
        ValueError: a model that is not attached or does not shift; an unknown language; the pivot.
    """
    handle = _shifting_handle(model)
    shift = handle.shift
    number = shift.language_id(language)
    code = shift.languages[number]
    if code == shift.pivot:
        raise ValueError(
            f"language: {code!r} is the pivot, whose text is never shifted; there is nothing to export. Use the "
            "run's adapter as it is, or --to merged --without-shift"
        )
    decoder = locate_decoder(model)
    tables = {index: handle.shift_table(index) for index in range(decoder.num_boundaries)}
    return ShiftVectors(
        language=code,
        pivot=shift.pivot,
        at={index: table[number].float().cpu() for index, table in tables.items() if table is not None},
        num_blocks=decoder.num_boundaries,
        hidden_size=decoder.hidden_size,
        model_type=decoder.module.config.model_type,  # type: ignore[union-attr,arg-type]
    )


def shifted_languages(model: Any) -> list[str]:
    """The codes of an attached model but for the pivot's.

    Raises:
        ValueError: a model that is not attached or does not shift.
    """
    shift = _shifting_handle(model).shift
    return [code for code in shift.languages if code != shift.pivot]


def _shifting_handle(model: Any) -> Any:
    handle = getattr(model, "shifcon", None)
    if handle is None:
        raise ValueError(
            "model: it has no shift to export; wanted an attached one, as shifcon_fast.load returns it for a run "
            "with a language space"
        )
    if not handle.alpha:
        raise ValueError(
            "model: the run was trained without the shift (shift: false), so there is none to export; its adapter "
            "is an ordinary PEFT adapter, and --to merged --without-shift merges it"
        )
    if handle.shift.is_map:
        raise ValueError(
            f"model: the run was trained with intervention {handle.shift.intervention!r}, a map between subspaces, "
            "which moves every hidden state in another way; exports hold one vector for each language. Serve it "
            "with shifcon_fast.load, or as --model shifcon in the evaluation harness"
        )
    if handle.shift.moves_pivot:
        raise ValueError(
            f"model: the run's intervention ({handle.shift.intervention}, targets {list(handle.shift.targets)}) "
            "moves the pivot's rows too, and what is exported leaves them alone; serve it with shifcon_fast.load"
        )
    return handle


def file_stem(language: str) -> str:
    """A language's code as the name of a file: everything but letters, digits and ``_-~.`` percent-encoded.

    Raises:
        ValueError: the name would be empty or too long for a file system.
    """
    name = quote(language, safe="")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if not 0 < len(name) <= _LONGEST_NAME:
        raise ValueError(
            f"language: {language[:40]!r} cannot name a file ({len(name)} characters when encoded); "
            f"wanted 1 … {_LONGEST_NAME}"
        )
    return name
