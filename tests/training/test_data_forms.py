"""The trainer takes data as ``Trainer`` does, and languages as people write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.training.trainer import ShifConTrainer

FLORES = {"en": "eng_Latn", "de": "deu_Latn", "sw": "swh_Latn", "tr": "tur_Latn"}


@pytest.fixture(scope="module")
def rows(instructions: list[Instruction]) -> list[dict[str, str]]:
    return [
        {"lang": FLORES[each.language], "prompt": each.turns[0].content, "response": each.turns[1].content}
        for each in instructions
    ]


def test_datasets_and_flores_codes_train_the_same_model(
    make_trainer: Callable[..., ShifConTrainer],
    rows: list[dict[str, str]],
    parallel_text: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    """The space says sw; files, datasets and evaluation sets say swh_Latn."""
    aligned = [
        {FLORES[language]: text for language, text in zip(parallel_text, texts, strict=True)}
        for texts in zip(*parallel_text.values(), strict=True)
    ]
    trainer = make_trainer(
        folder="other",
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset={
            "sw": datasets.Dataset.from_list([row for row in rows if row["lang"] == "swh_Latn"]),
            "rest": [row for row in rows if row["lang"] != "swh_Latn"],
        },
        parallel=datasets.Dataset.from_list(aligned),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        final_estimation=False,
    )
    plain = make_trainer(max_steps=2, final_estimation=False)
    trainer.train()
    plain.train()
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (trainer, plain)]
    assert losses[0] == losses[1]
    log = json.loads((tmp_path / "other" / "training_log.json").read_text())["evaluations"]
    assert {name for row in log for name in row if name.endswith("_loss")} == {
        "eval_sw_loss",
        "eval_rest_loss",
    }


def test_what_does_not_fit_is_refused(
    make_trainer: Callable[..., ShifConTrainer],
    rows: list[dict[str, str]],
) -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    with pytest.raises(DataError, match=r"DatasetDict of 'train'; wanted the rows themselves: one split"):
        make_trainer(train_dataset=splits)
    with pytest.raises(
        DataError, match=r"row 0 \(from 0\) of the given rows: .*got 'pt-PT'.* wanted one of en, de, sw, tr"
    ):
        make_trainer(train_dataset=[{**rows[0], "lang": "pt-PT"}])
