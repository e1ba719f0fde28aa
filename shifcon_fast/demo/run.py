"""The whole method on a generated world: language space, layer area, QLoRA with and without ShifCon, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shifcon_fast.demo.pages import write_page
from shifcon_fast.demo.pretrain import PretrainSettings, find_pretrained, pretrain
from shifcon_fast.demo.settings import BASELINE, DemoSettings
from shifcon_fast.demo.side_by_side import Job, SideBySide, usable_cores
from shifcon_fast.demo.stages import (
    BEFORE,
    Place,
    evaluate_before,
    is_evaluated,
    is_finished,
    one_thread,
    profile,
    train_and_evaluate,
)
from shifcon_fast.demo.world import World, build_world, write_world
from shifcon_fast.evaluation.report import TrainingLog
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.evaluation.system_comparison import ItemOutcome, SystemComparison
from shifcon_fast.evaluation.systems_table import systems_table
from shifcon_fast.storage import read_json, write_json
from shifcon_fast.training.run.run_folder import LOG

_SETTINGS = "demo.json"
_GROUPS = {"english_only": "seen only in English", "stated": "seen in every language"}


def run_demo(
    output: str | Path,
    *,
    seeds: int = 3,
    settings: DemoSettings | None = None,
    cache: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> str:
    """Run the demo into a folder; what is finished there already is kept, so an interrupted demo goes on.

    Args:
        output: gets ``report.html``, ``comparison.json``, ``world/``, ``space/``, and for every system and seed a
            run folder with its evaluation.
        seeds: training seeds a system; the pretrained model is the same for all.
        settings: None takes the demo's own.
        cache: see :func:`shifcon_fast.demo.pretrain.pretrain`.
        jobs: trainings at a time, each in a process of its own with one thread; None takes one a core. With 1, all
            runs in this process. The results are the same, bit for bit. Processes are spawned: a script that calls
            this does so under ``if __name__ == "__main__":``, or with ``jobs=1``.
        progress: show what is being done, and for how long, on stderr.

    Returns:
        What came out, in words, and where the report is.

    Raises:
        ValueError: fewer than one seed or job; a folder that holds a demo with other settings.
        RuntimeError: one of the processes was ended from outside.
        KeyboardInterrupt: after Ctrl-C; what was finished, and the trainings at hand, are saved.
    """
    for name, number in (("seeds", seeds), ("jobs", jobs)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: got {number}; wanted 1 or more")
    settings = settings or DemoSettings()
    output = Path(output)
    _claim(output, settings)
    return _Demo(output, settings, seeds, progress).run(cache, jobs or usable_cores())


class _Stages:
    """Says on stderr which stage of how many runs, and how long each took."""

    def __init__(self, total: int, progress: bool) -> None:
        self.progress = progress
        self._total, self._done, self._begin = total, 0, time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._done += 1
        started = time.monotonic()
        self.say(f"[{self._done}/{self._total}] {name}")
        yield
        now = time.monotonic()
        self.say(f"      {now - started:.0f} s, {now - self._begin:.0f} s in all")

    def say(self, text: str) -> None:
        if self.progress:
            tqdm.write(text, file=sys.stderr)


class _Demo:
    """The stages in their order."""

    def __init__(self, output: Path, settings: DemoSettings, seeds: int, progress: bool) -> None:
        self._output, self._settings, self._seeds = output, settings, seeds
        self._stages = _Stages(4, progress)
        self._world: World = build_world(settings.world)
        self._groups = {row["row"]: _GROUPS[row["group"]] for row in self._world.questions}

    def run(self, cache: str | Path | None, jobs: int) -> str:
        data = write_world(self._world, self._output / "world")
        runs = [(system, seed) for seed in range(1, self._seeds + 1) for system in self._settings.systems]
        with SideBySide(min(jobs, len(runs)), one_thread) as side_by_side:
            with self._stages("pretrain a tiny Llama on the generated world (kept for the next time)"):
                arguments = self._world, self._settings.pretrain, cache
                base = find_pretrained(*arguments)
                if base is None:
                    [base] = side_by_side.run([partial(_pretrain, *arguments, self._stages.progress)])
            place = Place(self._output, base, data, self._settings)
            with self._stages("estimate the language space and recommend the layer area"):
                if not place.has_space():
                    side_by_side.run([partial(profile, place, self._stages.progress)])
            self._train(side_by_side, place, runs)
        with self._stages("compare, and write the report"):
            comparison = self._compare(place)
            comparison.save(self._output / "comparison.json")
            space, area = place.space()
            report = write_page(
                self._output,
                comparison,
                world=self._world,
                space=space,
                area=area,
                before=EvaluationResult.load(self._output / BEFORE),
                after=EvaluationResult.load(place.run_folder(runs[-1][0], 1)),
            )
        return "\n".join([systems_table(comparison), "", f"report: {report}"])

    def _train(self, side_by_side: SideBySide, place: Place, runs: Sequence[tuple[str, int]]) -> None:
        """What is left to do of the trainings and evaluations."""
        todo = [run for run in runs if not is_finished(place, *run)]
        # The longest first, so that no process has nothing to do while another one is at the last of them.
        todo.sort(key=lambda run: not self._settings.systems[run[0]].get("w_mcl", 0))
        names = [f"{system}, seed {seed} of {self._seeds}" for system, seed in todo]
        jobs: list[Job] = [partial(train_and_evaluate, place, *run) for run in todo]
        if not is_evaluated(place):
            names.append("the model as it is")
            jobs.append(partial(evaluate_before, place))
        count = min(side_by_side.processes, max(len(jobs), 1))
        with (
            self._stages(f"train and evaluate {len(todo)} runs, {count} at a time, one thread each"),
            tqdm(
                total=len(todo) * self._settings.training["max_steps"],
                desc="training",
                unit="step",
                disable=not self._stages.progress,
            ) as bar,
        ):
            side_by_side.run(
                jobs,
                on_steps=bar.update,
                on_end=lambda number: self._stages.say(f"      done: {names[number]}"),
            )

    def _compare(self, place: Place) -> SystemComparison:
        before = EvaluationResult.load(self._output / BEFORE)
        outcomes = {BEFORE: {"-": self._outcomes(before)}}
        logs = {}
        for system in self._settings.systems:
            folders = {str(seed): place.run_folder(system, seed) for seed in range(1, self._seeds + 1)}
            outcomes[system] = {
                seed: self._outcomes(EvaluationResult.load(folder)) for seed, folder in folders.items()
            }
            logs[system] = {
                seed: read_json(folder / LOG, "a training log", TrainingLog)["steps"]
                for seed, folder in folders.items()
            }
        headline = _GROUPS["english_only"]
        return SystemComparison(before.pivot, BASELINE, outcomes, before=BEFORE, logs=logs, headline=headline)

    def _outcomes(self, result: EvaluationResult) -> dict[str, list[ItemOutcome]]:
        return {
            language: [
                ItemOutcome(str(outcome.row), self._groups[outcome.row], outcome.correct)
                for outcome in outcomes
            ]
            for language, outcomes in result.by_language().items()
        }


def _pretrain(
    world: World,
    settings: PretrainSettings,
    cache: str | Path | None,
    progress: bool,
    report: Callable[[int], None],
) -> Path:
    return pretrain(world, settings, cache=cache, progress=progress)


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
