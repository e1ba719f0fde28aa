"""What the demo does with the pretrained model, through the public interface, as with a user's own model and files.

Each stage is a function of a :class:`Place` that can run in a process of its own; what it finishes stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from shifcon_fast.data.questions import read_questions
from shifcon_fast.demo.settings import DemoSettings
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.evaluation.result import FILE_NAME
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.space.area import Area, recommend_area
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.storage import read_json, replacing, write_json
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.run.checkpoints import CARD, list_checkpoints
from shifcon_fast.training.run.run_folder import load
from shifcon_fast.training.trainer import ShifConTrainer
from shifcon_fast.training.weights.quantization import load_quantized

BEFORE = "before"
_AREA = "area.json"
_SPACE = "language_space.json"
_BATCH = 64  # sentences and questions of this world a batch


@dataclass(frozen=True)
class Place:
    """One demo's folder, its pretrained model, the files of its world, and its settings."""

    output: Path
    base: Path
    data: Mapping[str, Path]
    settings: DemoSettings

    def run_folder(self, system: str, seed: int) -> Path:
        """Of one training."""
        return self.output / "runs" / f"{system.replace(' ', '-')}-seed{seed}"

    def has_space(self) -> bool:
        """Whether :func:`profile` was here."""
        return (self.output / "space" / _SPACE).is_file()

    def space(self) -> tuple[LanguageSpace, Area]:
        """What :func:`profile` has written."""
        folder = self.output / "space"
        return LanguageSpace.load(folder), read_json(folder / _AREA, "a layer area", Area)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's."""
        return AutoTokenizer.from_pretrained(self.base)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, and no bar for every loading of a tiny model."""
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()


def profile(place: Place, progress: bool, report: Callable[[int], None]) -> None:
    """Estimate the language space, and recommend the layer area."""
    space = estimate_space(
        load_quantized(place.base),
        place.tokenizer,
        place.data["parallel"],
        batch_size=_BATCH,
        progress=progress,
    )
    with replacing(place.output / "space", _SPACE) as staging:
        space.save(staging)
        write_json(staging / _AREA, asdict(recommend_area(space)))


def evaluate_before(place: Place, report: Callable[[int], None]) -> None:
    """Evaluate the pretrained model, quantised, as it is."""
    _evaluate(place, load_quantized(place.base), place.output / BEFORE)


def is_evaluated(place: Place) -> bool:
    """Whether :func:`evaluate_before` was here."""
    return (place.output / BEFORE / FILE_NAME).is_file()


def train_and_evaluate(place: Place, system: str, seed: int, report: Callable[[int], None]) -> None:
    """One system with one seed; ``report`` gets the steps of the training as they are done."""
    folder = place.run_folder(system, seed)
    if not (folder / CARD).is_file():
        _train(place, system, seed, report)
    if not (folder / FILE_NAME).is_file():
        _evaluate(place, load(folder), folder)


def is_finished(place: Place, system: str, seed: int) -> bool:
    """Whether nothing is left to do of a training and its evaluation."""
    folder = place.run_folder(system, seed)
    return (folder / CARD).is_file() and (folder / FILE_NAME).is_file()


def _evaluate(place: Place, model: Any, folder: Path) -> None:
    result = evaluate(
        model,
        place.tokenizer,
        place.data["parallel_dev"],
        read_questions(place.data["questions"]),
        batch_size=_BATCH,
        max_new_tokens=4,
        progress=False,
    )
    replace(result, model=folder.name).save(folder)


def _train(place: Place, system: str, seed: int, report: Callable[[int], None]) -> None:
    settings, folder = place.settings, place.run_folder(system, seed)
    space, area = place.space()
    set_seed(seed)  # before the adapters are drawn
    model = load_quantized(
        place.base,
        lora=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        gradient_checkpointing=False,
    )
    arguments = ShifConArguments(
        output_dir=str(folder),
        seed=seed,
        forward=area.forward,
        backward=area.backward,
        report_to="none",
        save_strategy="no",  # Ctrl-C still saves a checkpoint
        disable_tqdm=True,
        **{**settings.training, **settings.systems[system]},
    )
    plain = not arguments.shift and not arguments.w_mcl
    trainer = ShifConTrainer(
        model,
        arguments,
        processing_class=place.tokenizer,
        train_dataset=place.data["instructions"],
        parallel=None if plain else place.data["parallel"],
        space=None if plain else space,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_ReportSteps(report))
    checkpoints = list_checkpoints(folder) if folder.is_dir() else []
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)


class _ReportSteps(TrainerCallback):
    """Calls a function with the number of steps done since its last call; of a resumed training, all before it."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._told = 0

    def _tell(self, step: int) -> None:
        self._report(step - self._told)
        self._told = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state.global_step)
