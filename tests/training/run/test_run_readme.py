"""The model card that training writes, and pushes: the run's own, in place of PEFT's and transformers'."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.trainer
from huggingface_hub import ModelCard

from shifcon_fast.training.trainer import ShifConTrainer


def test_a_trained_run_has_its_card(make_trainer: Callable[..., ShifConTrainer], tmp_path: Path) -> None:
    make_trainer(save_strategy="steps", save_steps=2).train()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.language == ["en", "de", "sw", "tr"]
        assert card.data.library_name == "peft"
        assert f"# {folder.name}\n" in card.content
        assert "boundary 1" in card.content
        assert str(tmp_path) not in card.content
    text = (tmp_path / "run" / "README.md").read_text()
    assert "| loss generation |" in text
    assert (
        "* training examples: en 8, de 8, sw 8, tr 8\n* translations: 24 sentences in each language\n" in text
    )


def test_what_is_pushed_is_the_run_s_card(
    make_trainer: Callable[..., ShifConTrainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(hub_model_id="me/swahili")
    pushed: list[str] = []

    def upload_folder(**arguments: Any) -> None:
        pushed.append((Path(arguments["folder_path"]) / "README.md").read_text())

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    trainer.hub_model_id = "me/swahili"
    with caplog.at_level(logging.WARNING):
        trainer.push_to_hub(
            license="apache-2.0",
            tags="kiswahili",
            finetuned_from="org/base",
            dataset_tags=["org/data", "/home/me/data.jsonl"],
            language="sw",
            tasks="text-generation",
        )
    card = ModelCard(pushed[0])
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": ["sw"],
        "license": "apache-2.0",
        "datasets": ["org/data"],
        "tags": ["base_model:adapter:org/base", "lora", "transformers", "shifcon", "kiswahili"],
    }
    assert 'snapshot_download("me/swahili")' in pushed[0]
    assert str(tmp_path) not in pushed[0]
    assert "The model card leaves out tasks, '/home/me/data.jsonl'" in caplog.text

    readme = tmp_path / "run" / "README.md"
    readme.write_text("# Mine\n")
    trainer.push_to_hub()
    assert pushed[1] == "# Mine\n"


def test_before_the_run_is_saved_there_is_no_card(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path
) -> None:
    """TRL asks for one at every checkpoint."""
    make_trainer().create_model_card(model_name="run", dataset_name=None, tags=[])
    assert not (tmp_path / "run" / "README.md").exists()


def test_examples_of_tables_are_counted_and_those_of_streams_are_not(
    make_trainer: Callable[..., ShifConTrainer],
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    rows = [{"lang": code, "prompt": "Ada", "response": "Roma"} for code in ("sw", "en", "sw")]
    table = datasets.Dataset.from_list(rows)
    assert make_trainer(train_dataset=table)._data.examples == {"en": 1, "sw": 2}
    assert make_trainer(train_dataset=table.to_iterable_dataset())._data.examples is None
