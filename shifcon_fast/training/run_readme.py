"""``README.md`` of a run folder: the model card, made of the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shifcon_fast.export.model_card import README, CardOptions, model_card
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.storage import read_json, write_file

_ADAPTER, _LOG = "adapter_config.json", "training_log.json"
_PICTURES = (".png", ".svg")


def write_readme(
    folder: Path,
    card: Mapping[str, Any],
    shift: LanguageShift | None,
    *,
    name: str | None = None,
    options: CardOptions | None = None,
) -> Path:
    """Write the model card of a run whose other files lie in ``folder``.

    Args:
        folder: of the run; its PNG and SVG pictures are shown.
        card, shift: what ``run_card.read_card`` and ``shift_file.read_shift`` return.
        name: the title; None takes the repository's, or the folder's.
        options: what the run does not know of itself.

    Returns:
        Where it is.
    """
    options = options or CardOptions()
    if name is None:
        name = options.repository.rpartition("/")[2] if options.repository else folder.resolve().name
    log = read_json(folder / _LOG, "the log of a run") if (folder / _LOG).is_file() else {}
    made = model_card(
        name,
        card,
        shift,
        read_json(folder / _ADAPTER, "the configuration of a PEFT adapter"),
        log=log.get("steps", ()),
        pictures=sorted(path.name for path in folder.iterdir() if path.suffix in _PICTURES),
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        chat_template=_has_chat_template(folder) and card["training"].get("use_chat_template", True),
        options=options,
    )
    write_file(folder / README, str(made).encode())
    return folder / README


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in read_json(settings, "a tokenizer's configuration")
