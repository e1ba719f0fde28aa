"""A run folder: PEFT adapter, shift, tokenizer and losses in one place (docs/formats.md)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch

from shifcon_fast.export.model_card import README, is_written_by_hand
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.fingerprint import fingerprint_differences, model_fingerprint
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.storage import read_json, replacing, write_json
from shifcon_fast.training.run.checkpoints import CARD
from shifcon_fast.training.run.generation import GENERATION, save_generation_config, stop_at
from shifcon_fast.training.run.run_card import ADAPTER, make_card, read_card
from shifcon_fast.training.run.run_readme import write_readme
from shifcon_fast.training.run.shift_file import SHIFT, read_shift, write_shift
from shifcon_fast.training.weights.adapter_files import (
    fit_embedding,
    save_adapter,
    shift_is_not_lost,
    tell_peft_of_the_shift,
)
from shifcon_fast.training.weights.quantization import load_quantized
from shifcon_fast.training.weights.sharding import Gathered

logger = logging.getLogger(__name__)

LOG = "training_log.json"
PROFILE = "profile"  # folder of the language space, where the run has estimated it itself
# What belongs to the card and goes with it when a run is replaced or started over.
FILES = (*ADAPTER, GENERATION, SHIFT, LOG)
_LOGGED = ("step", "epoch", "loss", "learning_rate", "grad_norm")
_LOGGED_BY_NAME = ("loss_", "alpha_")  # and all that begin so


@dataclass
class RunState:
    """What a run folder is made of, besides the model.

    Attributes:
        handle: the attachment, whose shift in use is saved; None for a plain run without one.
        shifted: whether the model was trained to generate shifted.
        tokenizer: saved beside the adapter; None saves none.
        settings: the method's arguments, for the record.
        log: ``trainer.state.log_history``.
        shift: saved instead of the handle's, where they differ.
        end_of_turn: the token ids that end a response, as ``data.chat_template.end_of_turn`` finds them.
        gathered: what :func:`.gather_weights` has brought together on all processes, where the model is sharded.
    """

    handle: ShiftHandle | None = None
    shifted: bool = True
    tokenizer: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()
    shift: LanguageShift | None = None
    end_of_turn: Sequence[int] = ()
    gathered: Gathered | None = None


def save_run(folder: str | Path, model: Any, state: RunState) -> None:
    """Write a run folder, all or nothing: a kill at any moment leaves what was there before.

    Args:
        folder: made if it does not exist; its other files stay.
        model: a PEFT model, attached or not.
        state: the rest.

    Raises:
        TypeError: not a PEFT model. OSError: the disk is full; the folder is then as it was.
    """
    with replacing(folder, CARD, FILES) as staging:
        write_run_files(staging, model, state, name=Path(folder).resolve().name)
        if is_written_by_hand(Path(folder) / README):
            logger.info("%s was written by hand, and is kept", Path(folder) / README)
            (staging / README).unlink()


def write_run_files(folder: Path, model: Any, state: RunState, name: str | None = None) -> None:
    """Write a run's files into a folder that nobody reads yet; ``name`` is the model card's title."""
    if not isinstance(model, peft.PeftModel):
        raise TypeError(
            f"model: got {type(model).__name__}; wanted a PEFT model, as load_quantized(..., lora=LoraConfig(...)) "
            "returns it: a run folder holds an adapter"
        )
    gathered = state.gathered
    save_adapter(folder, model, gathered.weights if gathered else None)
    shift = state.shift or (state.handle.shift if state.handle else None)
    if shift is not None and state.handle is not None and state.handle.learnt_alphas is not None:
        shift = replace(shift, alphas=state.handle.shift.alphas)
    if shift is not None:
        write_shift(folder, shift)
    if shift is not None and state.shifted and shift.alpha:
        tell_peft_of_the_shift(folder, CARD)
    save_generation_config(folder, model, state.end_of_turn)
    if state.tokenizer is not None:
        state.tokenizer.save_pretrained(str(folder))
    write_json(folder / LOG, _training_log(state.log))
    card = make_card(
        folder,
        model,
        state.settings,
        shift,
        shifted=state.shifted,
        end_of_turn=state.end_of_turn,
        fingerprint=gathered.fingerprint if gathered else None,
    )
    write_json(folder / CARD, card)
    write_readme(folder, card, shift, name=name)  # in place of PEFT's


def load(
    folder: str | Path,
    *,
    into: Any = None,
    adapter_name: str | None = None,
    is_trainable: bool = False,
    base: str | Path | None = None,
    quantization: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a run folder or one of its checkpoints: base model, adapter, shift; ready to generate.

    ``model.shifcon`` is the handle: ``model.shifcon.language = "sw"``, ``with model.shifcon.use("sw"):`` or
    ``language_ids=model.shifcon.language_ids(["sw", "en"])`` say which language is spoken. The shift belongs to the
    adapter: where that is not active (``disable_adapter``, ``set_adapter``), nothing is shifted. A run that was
    trained with ``shift=False`` is attached with alpha = 0: it takes languages and does not shift.

    Generation ends where the run's responses do (the card's ``end_of_turn``), and where the base model's did.

    Args:
        folder: what ``ShifConTrainer``, ``save_run`` or ``shifcon train`` wrote.
        into: a model that another run on the same base was loaded into: this run becomes a further adapter of it,
            for ``into.set_adapter`` to choose. It is as quantised and placed as it is.
        adapter_name: what to call the adapter; None takes the name that it was trained under.
        is_trainable: train the adapter on, in training mode, instead of freezing it.
        base: the base model, if it is no longer where it was; a Hugging Face id or folder.
        quantization: "nf4" or "none"; None loads it as it was trained.
        dtype, device_map, trust_remote_code: as for :func:`load_quantized`; dtype None is the trained one.

    Returns:
        A ``PeftModel``, frozen and in eval mode unless ``is_trainable``; ``into`` where that is given.

    Raises:
        ValueError: not a run folder, files that do not belong together, a base model that is missing or wrong, a
            name that an adapter of ``into`` has.
    """
    folder = Path(folder)
    card = read_card(folder)
    read_json(folder / ADAPTER[0], "the configuration of a PEFT adapter")
    name = adapter_name or card["adapter"]
    if into is not None:
        if (base, quantization, dtype, device_map) != (None, None, None, None):
            raise ValueError(
                "base, quantization, dtype, device_map: got one with into=, a model that is loaded"
            )
        if name in into.peft_config:
            raise ValueError(f"adapter_name: {name!r} is an adapter of the model already; pass another")
        model, source = into, into.get_base_model().name_or_path
    else:
        source = str(base or card["base_model"])
        try:
            model = load_quantized(
                source,
                quantization=quantization or card["quantization"],  # type: ignore[arg-type]
                dtype=dtype or getattr(torch, card["dtype"]),
                device_map=device_map,
                trust_remote_code=trust_remote_code,
            )
        except ValueError as error:
            raise ValueError(
                f"{folder}: its base model {source!r} cannot be loaded; pass base= (--base) if it moved: {error}"
            ) from error
    fit_embedding(model, folder, card["embedding_rows"])
    try:
        with shift_is_not_lost():
            if into is not None:
                model.load_adapter(str(folder), name, is_trainable=is_trainable)
            else:
                model = peft.PeftModel.from_pretrained(
                    model, str(folder), adapter_name=name, is_trainable=is_trainable
                ).train(is_trainable)
    except Exception as error:  # PEFT has no error of its own for a configuration that it cannot use
        raise ValueError(
            f"{folder}: its adapter does not fit the base model {source!r} ({', '.join(ADAPTER)}): {error}"
        ) from error
    if differences := fingerprint_differences(card["fingerprint"], model_fingerprint(model)):
        if into is not None:
            into.delete_adapter(name)
        raise ValueError(
            f"{folder}: its adapter was trained on {card['fingerprint']['name_or_path'] or 'another model'}, not "
            f"on {source} ({'; '.join(differences)}); pass the base= (--base) that it was trained on"
        )
    stop_at(model, card["end_of_turn"])
    if (shift := read_shift(folder, card)) is not None:
        try:
            _attach(model, shift if card["shift"] else replace(shift, alpha=0.0), name)
        except ValueError as error:
            raise ValueError(f"{folder / CARD}: cannot be attached: {error}") from error
    return model


def _attach(model: Any, shift: LanguageShift, adapter: str) -> None:
    handle: ShiftHandle | None = getattr(model, "shifcon", None)
    if handle is None:
        attach(model, shift, adapter=adapter)
    else:
        handle.add_shift(shift, adapter)


def _training_log(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [
        {name: value for name, value in row.items() if name in _LOGGED or name.startswith(_LOGGED_BY_NAME)}
        for row in history
        if "loss" in row
    ]
    return {"steps": steps, "evaluations": [dict(row) for row in history if _is_evaluation(row)]}


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    """A dict of evaluation sets logs ``eval_{name}_loss``."""
    return any(name.startswith("eval_") and name.endswith("_loss") for name in row)
