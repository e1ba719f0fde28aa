"""The two files of a language space on disk: tensors in safetensors, the card in JSON (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from shifcon_fast.storage import read_json, read_tensors, replacing, sha256_file, verify, write_json

TENSORS = "language_space.safetensors"
CARD = "language_space.json"
FORMAT = "shifcon_fast.language_space"
FORMAT_VERSION = 1
REQUIRED_TENSORS = ("mean", "rms", "median_norm", "sink_share")
OPTIONAL_TENSORS = (  # absent where subspaces were not estimated
    "ridge",
    "floors",
    "split_distances",
    "router_weight",
    "router_bias",
)


class TensorFile(TypedDict):
    """The tensor file that a card belongs to."""

    file: str
    sha256: str


@with_config(ConfigDict(extra="allow"))
class Fingerprint(TypedDict, total=False):
    """What is used of ``modeling.fingerprint``; its other entries are only compared."""

    embedding: list[float] | None
    name_or_path: str


@with_config(ConfigDict(extra="allow"))
class Origin(TypedDict, total=False):
    """The model that a space was estimated on."""

    fingerprint: Fingerprint


@with_config(ConfigDict(extra="allow"))
class Provenance(TypedDict, total=False):
    """How a space was made: what is used again; the rest is for readers."""

    model: Origin
    rank: int | None
    variance: float | None
    max_length: int | None


class SpaceCard(TypedDict):
    """``language_space.json``."""

    format: str
    format_version: int
    languages: list[str]
    pivot: str
    num_boundaries: int
    hidden_size: int
    boundaries: list[int]
    sentences: dict[str, int]
    card: Provenance
    tensors: TensorFile


def write(
    folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], card: Mapping[str, Any]
) -> None:
    """Write both files, all or nothing; other files of the folder stay."""
    with replacing(folder, CARD, [TENSORS]) as staging:
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


def read(folder: Path) -> tuple[dict[str, Tensor], SpaceCard]:
    """(tensors, card) of a folder; ValueError names the file that is missing, foreign or damaged."""
    card = read_json(
        folder / CARD,
        "the card of a language space, as LanguageSpace.save writes it",
        SpaceCard,
        wanted={"format": FORMAT, "format_version": FORMAT_VERSION},
    )
    verify(folder / TENSORS, card["tensors"]["sha256"], CARD)
    return read_tensors(folder / TENSORS), card
