"""The card of a run folder, ``shifcon.json``: what makes its files a run (docs/formats.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
import torch
import transformers
from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from shifcon_fast.modeling.fingerprint import model_fingerprint
from shifcon_fast.modeling.vocabulary import embedding_rows
from shifcon_fast.space.intervention import InterventionName
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.storage import read_json, sha256_file, verify
from shifcon_fast.training.run.checkpoints import CARD, list_checkpoints
from shifcon_fast.training.run.shift_file import SHIFT
from shifcon_fast.training.weights.adapter_files import adapter_to_save
from shifcon_fast.version import __version__

FORMAT = "shifcon_fast.run"
FORMAT_VERSION = 2
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class Boundaries(TypedDict):
    """A layer area [forward, backward)."""

    forward: int
    backward: int


@with_config(ConfigDict(extra="allow"))
class BaseFingerprint(TypedDict):
    """What is used of the base model's fingerprint; its other entries are only compared."""

    num_blocks: int
    embedding: list[float] | None
    name_or_path: str


class RunCard(TypedDict):
    """``shifcon.json``."""

    format: str
    format_version: int
    base_model: str
    fingerprint: BaseFingerprint
    quantization: Literal["nf4", "none"]
    adapter: str
    embedding_rows: Annotated[int, Field(gt=0)]
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    area: Boundaries | None
    alpha: Annotated[float, Field(allow_inf_nan=False)]
    recipe: Literal["stable", "official"]
    intervention: NotRequired[InterventionName]
    targets: NotRequired[list[str]]
    alphas: NotRequired[dict[str, float]]
    shift: bool
    end_of_turn: list[Annotated[int, Field(ge=0)]]
    pivot: str | None
    languages: list[str]
    files: dict[str, str]
    training: dict[str, Any]
    versions: dict[str, str]


def read_card(folder: str | Path) -> RunCard:
    """The checked content of a run folder's ``shifcon.json``; its tensor files are the ones it was written with.

    Raises:
        ValueError: not a run folder, one of a newer version, or a damaged one; the message says what the folder is
            instead, or names the file.
    """
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder}: {_what_it_is(folder)}; wanted a run folder with {CARD}")
    card = read_json(
        folder / CARD,
        "the card of a run, as ShifConTrainer writes it",
        RunCard,
        wanted={"format": FORMAT, "format_version": FORMAT_VERSION},
    )
    needed = {ADAPTER[1], *((SHIFT,) if card["area"] else ())}
    if needed != card["files"].keys():
        raise ValueError(f"{folder / CARD}: files: got {list(card['files'])}; wanted {sorted(needed)}")
    for name, digest in card["files"].items():
        verify(folder / name, digest, CARD)
    return card


def _what_it_is(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    if checkpoints := list_checkpoints(folder):
        return f"the training there did not finish; its last checkpoint is {checkpoints[-1]}"
    if (folder / "adapter_config.json").is_file():
        return "a PEFT adapter that was not trained here (PeftModel.from_pretrained loads it)"
    if (folder / "language_space.json").is_file():
        return "a language space (LanguageSpace.load reads it)"
    return "not ours"


def make_card(
    folder: Path,
    model: Any,
    settings: Mapping[str, Any],
    shift: LanguageShift | None,
    *,
    shifted: bool,
    end_of_turn: Sequence[int],
    fingerprint: Mapping[str, Any] | None = None,
) -> RunCard:
    """The card of a run whose other files lie in ``folder``; see ``run_folder.RunState`` for the arguments."""
    base = model.get_base_model()
    source = str(
        getattr(base.config, "_name_or_path", "") or model.active_peft_config.base_model_name_or_path
    )
    card: RunCard = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model": str(Path(source).resolve()) if Path(source).is_dir() else source,
        "fingerprint": fingerprint or model_fingerprint(model),  # type: ignore[typeddict-item]
        "quantization": "nf4" if getattr(base, "is_loaded_in_4bit", False) else "none",
        "adapter": adapter_to_save(model),
        "embedding_rows": embedding_rows(base),
        "dtype": str(base.get_input_embeddings().weight.dtype).removeprefix("torch."),  # type: ignore[typeddict-item]
        "area": {"forward": shift.forward, "backward": shift.backward} if shift else None,
        "alpha": shift.alpha if shift else 1.0,
        "recipe": shift.recipe if shift else "stable",
        "intervention": shift.intervention if shift else "mean",
        "targets": list(shift.targets) if shift else [],
        "shift": shifted and shift is not None,
        "end_of_turn": list(end_of_turn),
        "pivot": shift.pivot if shift else None,
        "languages": list(shift.languages) if shift else [],
        "files": {
            name: sha256_file(folder / name) for name in (ADAPTER[1], SHIFT) if (folder / name).is_file()
        },
        "training": dict(settings),
        "versions": {
            "shifcon_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
    }
    if shift is not None and (alphas := shift.alphas_by_language):
        card["alphas"] = alphas
    return card
