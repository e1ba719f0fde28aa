"""A tiny world to train in: a checkpoint, instructions in four languages, a language space, a trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import memory
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, TrainerCallback

from shifcon_fast.data.instructions import Instruction
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.notices import warn_once
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.trainer import ShifConTrainer
from shifcon_fast.training.weights.quantization import load_quantized

FORWARD, BACKWARD = 1, 3


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Trainer.train`` begins with a full one, half a second of every test that trains."""
    monkeypatch.setattr(memory, "clear_device_cache", lambda garbage_collection=False: None)


@pytest.fixture(autouse=True)
def _nothing_was_said_yet() -> None:
    warn_once.cache_clear()


@pytest.fixture(scope="session")
def instructions(parallel_text: dict[str, list[str]]) -> list[Instruction]:
    """The last word of each sentence is to be learnt; languages take turns."""
    found = []
    for index in range(8):
        for language, sentences in parallel_text.items():
            prompt, _, response = sentences[index].rpartition(" ")
            found.append(Instruction.single(language, prompt, response))
    return found


@pytest.fixture(scope="session")
def load_model(tiny_checkpoint: Path) -> Callable[..., Any]:
    """A model with the same random adapters every time."""

    def load(*, quantization: Any = "none", dropout: float = 0.0, **settings: Any) -> Any:
        settings.setdefault("gradient_checkpointing", True)  # or each run would predict its memory first
        torch.manual_seed(11)
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False
        )
        return load_quantized(tiny_checkpoint, lora, quantization, **settings)

    return load


@pytest.fixture(scope="session")
def space(
    load_model: Callable[..., Any],
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
) -> LanguageSpace:
    return estimate_space(load_model(), word_tokenizer, parallel_text, progress=False)


@pytest.fixture
def make_trainer(
    *,
    load_model: Callable[..., Any],
    space: LanguageSpace,
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
    instructions: list[Instruction],
    tmp_path: Path,
) -> Callable[..., ShifConTrainer]:
    """A trainer; keywords are arguments of the run, but for those of the trainer itself and of ``load_model``."""

    def make(
        *,
        folder: str = "run",
        model: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        dropout: float = 0.0,
        quantization: str = "none",
        **settings: Any,
    ) -> ShifConTrainer:
        inputs: dict[str, Any] = {
            "space": space,
            "parallel": parallel_text,
            "train_dataset": instructions,
            "eval_dataset": None,
            "data_collator": None,
            "processing_class": word_tokenizer,
        }
        inputs.update({name: settings.pop(name) for name in list(settings) if name in inputs})
        defaults: dict[str, Any] = {
            "forward": FORWARD,
            "backward": BACKWARD,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "contrastive_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return ShifConTrainer(
            model or load_model(quantization=quantization, dropout=dropout),
            ShifConArguments(output_dir=str(tmp_path / folder), **{**defaults, **settings}),
            callbacks=callbacks,
            **inputs,
        )

    return make
