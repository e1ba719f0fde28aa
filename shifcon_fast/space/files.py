"""The two files of a language space on disk: tensors in safetensors, the card in JSON (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shifcon_fast.storage import read_json, settle, sha256_file, staged_update, write_json

TENSORS = "language_space.safetensors"
CARD = "language_space.json"
FORMAT = "shifcon_fast.language_space"
FORMAT_VERSION = 1
OPTIONAL_TENSORS = ("ridge", "floors", "split_distances")  # absent where subspaces were not estimated


def write(
    folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], card: Mapping[str, Any]
) -> None:
    """Write both files, all or nothing; other files of the folder stay."""
    with staged_update(folder) as staging:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / TENSORS)
        write_json(
            staging / CARD,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                **description,
                "card": dict(card),
                "tensors": {"file": TENSORS, "sha256": sha256_file(staging / TENSORS)},
            },
        )


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors, description, card) of a folder; ValueError names the file that is missing, foreign or damaged."""
    settle(folder)
    path = folder / CARD
    description = read_json(path, "the card of a language space, as LanguageSpace.save writes it")
    if description.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {description.get('format')!r}; wanted {FORMAT!r}")
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {description.get('format_version')!r}; this release reads "
            f"{FORMAT_VERSION}: install the release that wrote it, or estimate the space again"
        )
    record, card = description.get("tensors"), description.get("card")
    if not isinstance(record, dict) or not isinstance(card, dict):
        raise ValueError(f"{path}: lacks 'tensors' or 'card'; it is damaged, estimate the space again")
    tensors_path = folder / TENSORS
    if not tensors_path.is_file():
        raise ValueError(f"{tensors_path}: no such file, though {CARD} lies beside it; copy both files")
    if sha256_file(tensors_path) != record.get("sha256"):
        raise ValueError(
            f"{tensors_path}: its SHA-256 is not the one in {CARD}; it was damaged or replaced, copy both again"
        )
    try:
        tensors = load_file(tensors_path)
    except SafetensorError as error:
        raise ValueError(f"{tensors_path}: not a safetensors file ({error})") from error
    return tensors, description, card
