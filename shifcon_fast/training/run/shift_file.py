"""``shift.safetensors`` of a run folder: the language vectors at f and b, with where they are from.

And what an intervention other than the mean shift needs besides, and α of each language where it was learnt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, with_config
from safetensors.torch import save_file
from typing_extensions import TypedDict

from shifcon_fast.space.language_router import LanguageRouter
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.space.space_folder import Origin
from shifcon_fast.storage import read_metadata, read_tensors

SHIFT = "shift.safetensors"
_TABLES = ("forward", "backward")
_MEDIANS = "median_norm"
_ROUTER = ("router_weight", "router_bias")
_OPTIONAL = ("directions", "bases", "links", "spread", "alphas")
_PROVENANCE = "provenance"


@with_config(ConfigDict(extra="allow"))
class Tokenizer(TypedDict, total=False):
    """The tokenizer that the texts were read by."""

    special_ids: list[int]


@with_config(ConfigDict(extra="allow"))
class ShiftProvenance(TypedDict, total=False):
    """Where a shift is from: what is used again; the rest is for readers."""

    model: Origin
    tokenizer: Tokenizer
    sentences: dict[str, int]
    max_length: int | None


def write_shift(folder: Path, shift: LanguageShift) -> None:
    """Write the file; what the tables are tables of, area, languages and pivot, is in the run's card."""
    tensors = {name: vectors.contiguous() for name, vectors in zip(_TABLES, shift.vectors, strict=True)}
    metadata = {"format": "pt", _PROVENANCE: json.dumps(dict(shift.provenance), ensure_ascii=False)}
    if shift.router is not None:
        tensors |= {_ROUTER[0]: shift.router.weight.contiguous(), _ROUTER[1]: shift.router.bias.contiguous()}
    for name in _OPTIONAL:
        if (tensor := getattr(shift, name)) is not None:
            tensors[name] = tensor.contiguous()
    save_file({**tensors, _MEDIANS: shift.median_norm.contiguous()}, folder / SHIFT, metadata)


def read_shift(folder: Path, card: Mapping[str, Any]) -> LanguageShift | None:
    """The shift of a run with this card (``run_card.RunCard``); None for a plain run without one.

    Raises:
        ValueError: tensors that are missing, or of other shapes than the card says; the message names the file.
    """
    if card["area"] is None:
        return None
    path = folder / SHIFT
    tensors = read_tensors(path)
    provenance = read_metadata(path, _PROVENANCE, "where a run's shift is from", ShiftProvenance)
    if missing := [name for name in (*_TABLES, _MEDIANS) if name not in tensors]:
        raise ValueError(f"{path}: lacks {', '.join(map(repr, missing))}")
    forward, backward = (tensors[name] for name in _TABLES)
    optional: dict[str, Any] = {name: tensors[name].float() for name in _OPTIONAL if name in tensors}
    try:
        if forward.dim() != 2 or forward.shape != backward.shape:
            raise ValueError(
                f"tables: got {tuple(forward.shape)} and {tuple(backward.shape)}; wanted (languages, d) twice"
            )
        return LanguageShift(
            tuple(card["languages"]),
            card["pivot"],
            **card["area"],
            vectors=torch.stack([forward, backward]).float(),
            median_norm=tensors[_MEDIANS].float(),
            num_boundaries=card["fingerprint"]["num_blocks"],
            alpha=card["alpha"],
            recipe=card["recipe"],
            provenance=provenance,
            router=LanguageRouter(*(tensors[name].float() for name in _ROUTER))
            if _ROUTER[0] in tensors
            else None,
            intervention=card.get("intervention", "mean"),
            targets=tuple(card.get("targets", ())),
            **optional,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not fit the card beside it: {error}") from error
