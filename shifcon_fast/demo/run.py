"""The whole method on a generated world: language space, layer area, QLoRA with and without ShifCon, report.

Everything after the pretraining goes through the public interface, on files in the public formats, as a user's own
model and data would.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from shifcon_fast.data.questions import read_questions
from shifcon_fast.demo.pages import write_page
from shifcon_fast.demo.pretrain import pretrain
from shifcon_fast.demo.settings import BASELINE, DemoSettings
from shifcon_fast.demo.world import World, build_world, write_world
from shifcon_fast.evaluation.comparison import Comparison, ItemOutcome
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.evaluation.findings import comparison_findings
from shifcon_fast.evaluation.report import TrainingLog
from shifcon_fast.evaluation.result import FILE_NAME, EvaluationResult
from shifcon_fast.modeling.estimate import estimate_space
from shifcon_fast.space.area import Area, recommend_area
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.storage import read_json, replacing, write_json
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.checkpoints import CARD, list_checkpoints
from shifcon_fast.training.quantization import load_quantized
from shifcon_fast.training.run_folder import LOG, load
from shifcon_fast.training.trainer import ShifConTrainer

BEFORE = "before"
_SETTINGS = "demo.json"
_AREA = "area.json"
_SPACE = "language_space.json"
_GROUPS = {"english_only": "seen only in English", "stated": "seen in every language"}
_MAX_THREADS = 4  # more only wait for one another: the model is tiny
_BATCH = 64  # sentences and questions of this world a batch


def run_demo(
    output: str | Path,
    *,
    seeds: int = 3,
    settings: DemoSettings | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> str:
    """Run the demo into a folder; what is finished there already is kept, so an interrupted demo goes on.

    Args:
        output: gets ``report.html``, ``comparison.json``, ``world/``, ``space/``, and for every system and seed a
            run folder with its evaluation.
        seeds: training seeds a system; the pretrained model is the same for all.
        settings: None takes the demo's own.
        cache: see :func:`shifcon_fast.demo.pretrain.pretrain`.
        progress: show what is being done, and for how long, on stderr.

    Returns:
        What came out, in words, and where the report is.

    Raises:
        ValueError: fewer than one seed; a folder that holds a demo with other settings.
        KeyboardInterrupt: after Ctrl-C; what was finished, and the training at hand, are saved.
    """
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}; wanted 1 or more")
    settings = settings or DemoSettings()
    output = Path(output)
    _claim(output, settings)
    with _quiet_and_few_threads():
        demo = _Demo(output, settings, cache, _Stages(4 + len(settings.systems) * seeds, progress))
        return demo.run(seeds)


class _Stages:
    """Says on stderr which stage of how many runs, and how long each took."""

    def __init__(self, total: int, progress: bool) -> None:
        self.progress = progress
        self._total, self._done, self._begin = total, 0, time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._done += 1
        started = time.monotonic()
        self._say(f"[{self._done}/{self._total}] {name}")
        yield
        now = time.monotonic()
        self._say(f"      {now - started:.0f} s, {now - self._begin:.0f} s in all")

    def _say(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)


class _Demo:
    """The stages, each a no-op where its files are there already."""

    def __init__(
        self, output: Path, settings: DemoSettings, cache: str | Path | None, stages: _Stages
    ) -> None:
        self._output, self._settings, self._cache, self._stages = output, settings, cache, stages
        self._world: World = build_world(settings.world)
        self._groups = {row["row"]: _GROUPS[row["group"]] for row in self._world.questions}

    def run(self, seeds: int) -> str:
        with self._stages("generate the world, and pretrain a tiny Llama on it (kept for the next time)"):
            self._data = write_world(self._world, self._output / "world")
            self._base = pretrain(
                self._world,
                self._settings.pretrain,
                cache=self._cache,
                progress=self._stages.progress,
            )
            self._tokenizer = AutoTokenizer.from_pretrained(self._base)
        with self._stages("estimate the language space and recommend the layer area"):
            space, area = self._profile()
        with self._stages("evaluate the model as it is"):
            before = self._evaluate(self._output / BEFORE)
        for seed in range(1, seeds + 1):
            for system in self._settings.systems:
                with self._stages(f"train and evaluate {system}, seed {seed} of {seeds}"):
                    self._train(system, seed, space, area)
                    self._evaluate(self._run_folder(system, seed))
        with self._stages("compare, and write the report"):
            comparison = self._compare(before, seeds)
            comparison.save(self._output / "comparison.json")
            last = list(self._settings.systems)[-1]
            after = EvaluationResult.load(self._run_folder(last, 1))
            report = write_page(
                self._output,
                comparison,
                world=self._world,
                space=space,
                area=area,
                before=before,
                after=after,
            )
        return "\n".join([*comparison_findings(comparison), "", f"report: {report}"])

    def _run_folder(self, system: str, seed: int) -> Path:
        return self._output / "runs" / f"{system.replace(' ', '-')}-seed{seed}"

    def _profile(self) -> tuple[LanguageSpace, Area]:
        folder = self._output / "space"
        if not (folder / _SPACE).is_file():
            space = estimate_space(
                load_quantized(self._base),
                self._tokenizer,
                self._data["parallel"],
                batch_size=_BATCH,
                progress=self._stages.progress,
            )
            with replacing(folder, _SPACE) as staging:
                space.save(staging)
                write_json(staging / _AREA, asdict(recommend_area(space)))
        return LanguageSpace.load(folder), read_json(folder / _AREA, "a layer area", Area)

    def _evaluate(self, folder: Path) -> EvaluationResult:
        """Of the run in the folder, or of the model as it is."""
        if (folder / FILE_NAME).is_file():
            return EvaluationResult.load(folder)
        model = load_quantized(self._base) if folder.name == BEFORE else load(folder)
        result = evaluate(
            model,
            self._tokenizer,
            self._data["parallel_dev"],
            read_questions(self._data["questions"]),
            batch_size=_BATCH,
            max_new_tokens=4,
            progress=self._stages.progress,
        )
        result = replace(result, model=folder.name)
        result.save(folder)
        return result

    def _train(self, system: str, seed: int, space: LanguageSpace, area: Area) -> None:
        folder = self._run_folder(system, seed)
        if (folder / CARD).is_file():
            return
        set_seed(seed)  # before the adapters are drawn
        model = load_quantized(
            self._base,
            lora=LoraConfig(
                r=self._settings.lora_rank,
                lora_alpha=self._settings.lora_alpha,
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
            **{**self._settings.training, **self._settings.systems[system]},
        )
        plain = not arguments.shift and not arguments.w_mcl
        trainer = ShifConTrainer(
            model,
            arguments,
            processing_class=self._tokenizer,
            train_dataset=self._data["instructions"],
            parallel=None if plain else self._data["parallel"],
            space=None if plain else space,
        )
        trainer.remove_callback(PrinterCallback)
        if self._stages.progress:
            trainer.add_callback(_Bar(system))
        checkpoints = list_checkpoints(folder) if folder.is_dir() else []
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)

    def _compare(self, before: EvaluationResult, seeds: int) -> Comparison:
        outcomes = {BEFORE: {"-": self._outcomes(before)}}
        logs = {}
        for system in self._settings.systems:
            folders = {str(seed): self._run_folder(system, seed) for seed in range(1, seeds + 1)}
            outcomes[system] = {
                seed: self._outcomes(EvaluationResult.load(folder)) for seed, folder in folders.items()
            }
            logs[system] = {
                seed: read_json(folder / LOG, "a training log", TrainingLog)["steps"]
                for seed, folder in folders.items()
            }
        return Comparison(before.pivot, BASELINE, outcomes, before=BEFORE, logs=logs)

    def _outcomes(self, result: EvaluationResult) -> dict[str, list[ItemOutcome]]:
        return {
            language: [
                ItemOutcome(str(outcome.row), self._groups[outcome.row], outcome.correct)
                for outcome in outcomes
            ]
            for language, outcomes in result.by_language().items()
        }


class _Bar(TrainerCallback):
    """One progress bar a run, with the last losses; Trainer's own prints a line for each log."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._name, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        losses = {
            name: f"{logs[name]:.3f}" for name in ("loss_generation", "loss_contrastive") if name in logs
        }
        if losses:
            self._bar.set_postfix({name.removeprefix("loss_"): value for name, value in losses.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


def _claim(output: Path, settings: DemoSettings) -> None:
    """Make the folder this demo's, or refuse one that is another's."""
    wanted = settings.to_json()
    if (output / _SETTINGS).is_file():
        found = read_json(output / _SETTINGS, "the settings of a demo")
        if found != wanted:
            raise ValueError(
                f"output: {output} holds a demo with other settings; choose another folder, or delete that one"
            )
        return
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output: {output} holds other files; wanted a new folder, or that of a demo")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / _SETTINGS, wanted)


@contextmanager
def _quiet_and_few_threads() -> Iterator[None]:
    """Without a bar for every loading of the tiny model, and without more threads than it can use."""
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(min(threads, _MAX_THREADS))
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()
