"""A run without instructions, and languages that instructions or translations alone have: refused, or said."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from shifcon_fast.data.instructions import Instruction
from shifcon_fast.training.trainer import ShifConTrainer


def test_a_run_without_instructions_is_refused(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path
) -> None:
    """None, no rows, and none that makes a batch; nothing is saved as if it were trained."""
    with pytest.raises(ValueError, match=r"train_dataset: none given; wanted instructions, .*w_gen=0"):
        make_trainer(train_dataset=None, w_gen=0.0).train()
    with pytest.raises(ValueError, match="instructions: got an empty sequence; wanted at least one"):
        make_trainer(train_dataset=[])
    empty = datasets.Dataset.from_dict({"lang": [], "prompt": [], "response": []})
    with pytest.raises(ValueError, match="the given data holds no rows; wanted at least one"):
        make_trainer(train_dataset=empty)
    too_few = make_trainer(per_device_train_batch_size=1000, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"not one batch .* nothing was trained; wanted at least 1000 rows"):
        too_few.train()
    assert not (tmp_path / "run" / "shifcon.json").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        (
            {"left": ("en", "sw")},
            "has de, tr, and no instruction is in it, .*; learnt from translations alone",
        ),
        ({"left": ("en",), "w_mcl": 0.0}, "has de, sw, tr, .*; not trained on"),
        ({"long": "tr", "too_long": "drop", "max_length": 10}, "has tr, .*or left within max_length"),
        (
            {"shift": False, "more": "fr"},
            "instructions in fr, which the language space does not have, are trained",
        ),
        ({"w_gen": 0.0}, "w_gen is 0: instructions are passed through the model for the logged loss alone"),
        ({"text": "fr"}, "the given mapping: fr not read; languages en, de, sw, tr"),
    ],
    ids=[
        "both",
        "text alone",
        "neither",
        "all too long",
        "instructions alone",
        "no weight",
        "not in the space",
    ],
)
def test_a_language_in_only_one_of_the_data_is_said(
    *,
    make_trainer: Callable[..., ShifConTrainer],
    instructions: list[Instruction],
    parallel_text: dict[str, list[str]],
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    said: str | None,
) -> None:
    caplog.set_level(logging.INFO)
    settings = dict(settings)
    left, long, more, text = (settings.pop(name, None) for name in ("left", "long", "more", "text"))
    rows = [each for each in instructions if left is None or each.language in left]
    rows = [
        Instruction.single(long, "Ada " * 20, "Ben") if each.language == long else each for each in rows
    ] + [Instruction.single(each, "Ada", "Ben") for each in (more,) if each]
    extra = {text: parallel_text["de"]} if text else {}
    make_trainer(train_dataset=rows, parallel={**parallel_text, **extra}, max_steps=1, **settings).train()
    told = [each for each in caplog.messages if re.search("train_dataset|not read|w_gen", each)]
    assert len(told) == (said is not None)
    assert said is None or re.search(said, told[0])
