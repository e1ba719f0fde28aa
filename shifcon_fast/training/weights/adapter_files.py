"""The PEFT adapter of a run on disk: in the folder itself, whatever its name; with the embedding if it grew."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from shifcon_fast.modeling.adapters import active_adapter
from shifcon_fast.modeling.vocabulary import embedding_rows
from shifcon_fast.storage import read_json, write_json

logger = logging.getLogger(__name__)

UNSHIFTED_KEY = "shifcon_shift_is_left_out_unless_loaded_with_shifcon_fast"
"""A key of ``adapter_config.json`` that PEFT does not know and therefore warns of, by its name."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_EMBEDDINGS = ("embed_tokens", "embed_in", "word_embeddings", "wte", "lm_head", "embed_out")


def adapter_to_save(model: Any) -> str:
    """The name of the one adapter that is active.

    Raises:
        ValueError: several are, or its name would be a path.
    """
    name = active_adapter(model)
    if name != Path(name).name or name in (".", ".."):
        raise ValueError(f"model: its adapter is called {name!r}; wanted a name that is no path")
    return name


def save_adapter(folder: Path, model: Any, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the active adapter's files into ``folder``; PEFT puts one that is not called "default" deeper.

    Where ``resize_token_embeddings`` has changed the embedding, its rows are written too, since the base model does
    not have them. ``weights``: instead of the model's own, by their names in it.
    """
    name = adapter_to_save(model)
    model.save_pretrained(
        str(folder),
        selected_adapters=[name],
        save_embedding_layers=_saves_embedding(model, name),
        state_dict=None if weights is None else dict(weights),
    )
    if name != "default":
        for path in (folder / name).iterdir():
            os.replace(path, folder / path.name)
        (folder / name).rmdir()


def saved_weights(model: Any) -> dict[str, Tensor]:
    """The parameters that :func:`save_adapter` writes, by their names in the model; nothing is copied."""
    name = adapter_to_save(model)
    named = dict(model.named_parameters())
    kept = get_peft_model_state_dict(
        model, named, adapter_name=name, save_embedding_layers=_saves_embedding(model, name)
    )
    chosen = {id(each) for each in kept.values()}
    return {key: each for key, each in named.items() if id(each) in chosen}


def tell_peft_of_the_shift(folder: Path, card: str) -> None:
    """Have PEFT warn who loads the saved adapter with it: the shift, of which ``card`` tells, is not in it."""
    known = read_json(folder / _CONFIG, "a PEFT adapter's configuration")
    write_json(folder / _CONFIG, {**known, UNSHIFTED_KEY: f"see {card}"})


@contextmanager
def shift_is_not_lost() -> Iterator[None]:
    """Inside, PEFT does not warn of :data:`UNSHIFTED_KEY`: the caller attaches the shift."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{UNSHIFTED_KEY}")
        yield


def warn_of_what_is_not_saved(model: Any) -> None:
    """Say, when a run begins, that other adapters are left out, and that a resized embedding is saved each time.

    Raises:
        ValueError: a resized embedding that the adapter targets; PEFT would not save the whole of it.
    """
    name = adapter_to_save(model)
    if others := [other for other in model.peft_config if other != name]:
        logger.warning(
            "The run saves its adapter %r; %s are not part of it", name, ", ".join(map(repr, others))
        )
    if _is_resized(model):
        if _adapts_embedding(model, name):
            raise ValueError(
                "model: its embedding was resized and has adapters (target_modules), which cannot be saved "
                "together; wanted the base model resized, saved and loaded again first, or "
                "modules_to_save=['embed_tokens', 'lm_head'] instead"
            )
        weight = model.get_base_model().get_input_embeddings().weight
        logger.warning(
            "The embedding was resized to %d rows: every checkpoint carries it (%.2f GiB)",
            weight.shape[0],
            weight.nbytes / 2**30,
        )


def fit_embedding(model: Any, folder: Path, rows: int) -> None:
    """Give a base model the number of embedding rows that a run was trained with; the adapter's file fills them.

    Raises:
        ValueError: the rows differ, and the files do not carry them.
    """
    found = embedding_rows(model)
    if rows == found:
        return
    with safe_open(folder / _WEIGHTS, framework="pt") as weights:
        names = list(weights.keys())
        embeddings = [each for each in names if _is_embedding(each)]
        carried = {weights.get_slice(name).get_shape()[0] for name in embeddings}
    if carried != {rows}:
        raise ValueError(
            f"{folder}: was trained on a base model with {rows} embedding rows; this one has {found}, and the run "
            "does not carry the others; wanted the base model it was trained on (base=, --base)"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.requires_grad_(False)


def _saves_embedding(model: Any, name: str) -> bool:
    return _adapts_embedding(model, name) or _is_resized(model)


def _adapts_embedding(model: Any, name: str) -> bool:
    targets = model.peft_config[name].target_modules
    listed = () if targets is None or isinstance(targets, str) else targets
    return any(target.rpartition(".")[2] in _EMBEDDINGS for target in listed)


def _is_embedding(name: str) -> bool:
    """Whether a tensor of an adapter file is the embedding or the head, as it is or below an adapter of its own."""
    *path, last = name.split(".")
    return (
        last == "weight"
        and not any(each.startswith("lora_") for each in path)
        and not {*path}.isdisjoint(_EMBEDDINGS)
    )


def _is_resized(model: Any) -> bool:
    """Whether the embedding has another number of rows than the base model's own configuration says."""
    base = model.get_base_model()
    source = getattr(base.config, "_name_or_path", "") or model.active_peft_config.base_model_name_or_path
    if not source:
        return False
    try:  # of what is on this machine: the model was loaded from it
        config = type(base.config).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return False
    stored = getattr(config.get_text_config(), "vocab_size", None)
    return stored is not None and stored != embedding_rows(base)
