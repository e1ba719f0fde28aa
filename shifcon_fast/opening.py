"""Opening what ``--model`` names: a run folder (attached), a model folder or a Hugging Face id."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from shifcon_fast.data.chat_template import NOTHING_ENDS_A_TURN, end_of_turn, stopping_ids
from shifcon_fast.notices import warn_once
from shifcon_fast.training.run.checkpoints import CARD, list_checkpoints
from shifcon_fast.training.run.generation import stop_at
from shifcon_fast.training.run.run_card import RunCard, read_card
from shifcon_fast.training.run.run_folder import load
from shifcon_fast.training.weights.quantization import load_quantized, read_dtype

logger = logging.getLogger(__name__)


def open_model(
    name: str,
    *,
    quantization: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> tuple[Any, Any]:
    """Open a run folder (attached), a model folder or a Hugging Face id, frozen and in eval mode.

    Args:
        name: which.
        quantization: "nf4" or "none"; None takes what a run was trained with, and nf4 for other models.
        dtype: "float32", "bfloat16" or "float16"; None takes what a run was trained in, and what is best here for
            other models (see :func:`~shifcon_fast.training.weights.quantization.load_quantized`).
        trust_remote_code: run code that comes with the model.
        base: the base model of a run, if it is no longer where it was.

    Returns:
        The model and its tokenizer. ``generate`` stops where the run's responses end; for other models, where the
        tokenizer's chat template ends a turn and where the model's own settings say. Where these differ, that is
        logged.
    """
    if not is_run(name):
        model = load_quantized(
            name,
            quantization=quantization or "nf4",  # type: ignore[arg-type]
            dtype=read_dtype(dtype),
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(name, trust_remote_code)
        _end_turns_as_the_template_does(name, model, tokenizer)
        return model, tokenizer
    card = read_card(name)
    model = load(
        name,
        base=base,
        quantization=quantization,
        dtype=read_dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
    return model, run_tokenizer(name, card, base=base, trust_remote_code=trust_remote_code)


def run_tokenizer(
    folder: str, card: RunCard, *, base: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a run with this card, or that of its base; its prompts look as they did in training.

    Raises:
        ValueError: there is none that can be loaded.
    """
    source = folder if (Path(folder) / "tokenizer_config.json").is_file() else base or card["base_model"]
    tokenizer = load_tokenizer(source, trust_remote_code)
    if not card["training"].get("use_chat_template", True):
        tokenizer.chat_template = None
    return tokenizer


def _end_turns_as_the_template_does(name: str, model: Any, tokenizer: Any) -> None:
    own = stopping_ids(model.generation_config, ())
    stop_at(model, end_of_turn(tokenizer))
    ends = stopping_ids(model.generation_config, ())
    if not ends:
        warn_once(NOTHING_ENDS_A_TURN)
    elif ends != own and set(ends) != set(own):
        logger.warning(
            "%s: the model's generation settings end answers at %s; its tokenizer ends a turn with %s, so answers "
            "end there as well",
            name,
            " ".join(tokenizer.convert_ids_to_tokens(own)) or "nothing",
            tokenizer.convert_ids_to_tokens(ends[0]),
        )


def is_run(name: str) -> bool:
    """Whether a folder is a run's; also an unfinished one's, which ``read_card`` then refuses with advice."""
    return (Path(name) / CARD).is_file() or bool(Path(name).is_dir() and list_checkpoints(name))


def load_tokenizer(source: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder or a Hugging Face id.

    Raises:
        ValueError: there is none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {source} has no tokenizer that can be loaded: {error}") from error
