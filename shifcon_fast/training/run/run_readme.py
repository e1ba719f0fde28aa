"""``README.md`` of a run folder: the model card, made of the files beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shifcon_fast.export.model_card import README, CardOptions, is_hub_id, is_written_by_hand, model_card
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.storage import read_json, write_file
from shifcon_fast.training.run.checkpoints import CARD
from shifcon_fast.training.run.run_card import read_card
from shifcon_fast.training.run.shift_file import read_shift

logger = logging.getLogger(__name__)

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


class RunReadme:
    """Mixin of trainers: where ``push_to_hub`` wants a model card, it is the run's own."""

    args: Any
    is_world_process_zero: Any

    def create_model_card(  # noqa: PLR0917 - as Trainer's
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: Any = None,
        dataset_args: Any = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write the run's model card; arguments as ``Trainer``'s and TRL's. What is left out is said.

        A card that a person has written stays. Before the run is saved there is none.
        """
        folder = Path(str(self.args.output_dir))
        if not self.is_world_process_zero() or not (folder / CARD).is_file():
            return
        if is_written_by_hand(folder / README):
            logger.info("%s was written by hand, and is kept", folder / README)
            return
        datasets = _listed(dataset_tags) or _listed(dataset_name)
        no_ids = [each for each in (*datasets, *_listed(finetuned_from)) if not is_hub_id(each)]
        given = {"tasks": tasks, "dataset": dataset, "dataset_args": dataset_args}
        if ignored := [*(name for name, value in given.items() if value), *map(repr, no_ids)]:
            logger.warning("The model card leaves out %s", ", ".join(ignored))
        card = read_card(folder)
        options = CardOptions(
            base_model=None if finetuned_from in no_ids else finetuned_from,
            repository=getattr(self, "hub_model_id", None),
            license=license,
            datasets=[each for each in datasets if each not in no_ids],
            tags=_listed(tags),
            languages=_listed(language) or None,
        )
        write_readme(folder, card, read_shift(folder, card), name=model_name, options=options)


def _listed(values: str | Sequence[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else list(values or ())
