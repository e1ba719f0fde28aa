"""Where a run's answers end: the base model's generation settings, with what ends a turn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from shifcon_fast.data.chat_template import stopping_ids

GENERATION = "generation_config.json"


def stop_at(model: Any, ends: Sequence[int]) -> None:
    """Have the model's ``generate`` stop at these token ids too, beside its own."""
    config = getattr(model, "generation_config", None)
    if config is not None and (ids := stopping_ids(config, ends)):
        config.eos_token_id = ids


def save_generation_config(folder: Path, model: Any, ends: Sequence[int]) -> None:
    """Write the generation settings of a PEFT model's base, stopping at ``ends`` too."""
    own = getattr(model.get_base_model(), "generation_config", None) or GenerationConfig()
    settings = copy.deepcopy(own)
    settings.eos_token_id = stopping_ids(own, ends) or None
    try:
        settings.save_pretrained(str(folder))
    except ValueError:  # settings of the base that contradict each other can be read but not written
        tokens = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**tokens).save_pretrained(str(folder))
