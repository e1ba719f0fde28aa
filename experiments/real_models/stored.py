"""A run's result as one small JSON file: every log-likelihood; the questions are made again by the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from arms import LANGUAGES, PIVOT, PROTOCOL, fingerprint, split_for

from shifcon_fast.data.cldr import Split, cldr_rows
from shifcon_fast.data.questions import Question, read_questions
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome
from shifcon_fast.evaluation.perplexity import Perplexity
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.storage import read_json, write_json

KIND = "experiment run"
_DIGITS = 4  # of nats

Run = tuple[str, str, int]
"""(model, arm, seed)."""

Runs = dict[Run, tuple[EvaluationResult, dict[str, Any]]]
"""Run → (evaluation, what is known of the run)."""


@cache
def questions(split: Split) -> list[Question]:
    """The CLDR questions of a split's territories, in all languages."""
    return read_questions(cldr_rows(LANGUAGES, split=split))


def write_run(path: Path, result: EvaluationResult, run: Mapping[str, Any]) -> None:
    """Write an evaluation; ``run`` says which run it is of: model, arm, seed, and what is good to know of it."""
    mode = result.mode
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "kind": KIND,
            "protocol": PROTOCOL,
            "fingerprint": fingerprint(run["model"], run["arm"]),
            **run,
            "area": result.area,
            "choices": {
                f"{each.row}.{each.language}": [round(nats, _DIGITS) for nats in each.log_likelihoods]
                for each in result.multiple_choice[mode]
            },
            "perplexity": {
                code: {"nll": [round(nats, _DIGITS) for nats in each.nll], "tokens": each.tokens}
                for code, each in result.perplexity[mode].items()
            },
            "mexa": {
                code: [round(value, _DIGITS) for value in scores.mexa]
                for code, scores in result.retrieval[mode].scores.items()
            },
            "settings": result.settings,
            "versions": result.versions,
        },
        indent=None,  # a number a line would be 7,000 lines a run
    )


def result_file(results: Path, model: str, arm: str, seed: int) -> Path:
    """Where a run's result lies."""
    return results / model / f"{arm}-{seed}.json"


def read_runs(results: Path, planned: Iterable[Run]) -> Runs:
    """Those of the planned runs that have a result, in their order; each file is read once.

    Raises:
        ValueError: as :func:`read_run`, or a file that is of another run than its name says.
    """
    held: Runs = {}
    for run in planned:
        path = result_file(results, *run)
        if not path.is_file():
            continue
        result, known = read_run(path)
        if (of := (known["model"], known["arm"], known["seed"])) != run:
            raise ValueError(f"{path}: is of {' '.join(map(str, of))}; wanted that of its name")
        held[run] = result, known
    return held


def of_one_text(held: Runs, *, given: str | None = None) -> None:
    """Refuse runs of unequal text; those made before a result named its own are taken as they are.

    Args:
        held: as :func:`read_runs` gives them.
        given: the digest (``texts.digest``) that runs yet to be made would have.

    Raises:
        ValueError: two digests.
    """
    first: tuple[str, Any] | None = None if given is None else (given, "of the data folder")
    for (model, arm, seed), (_, known) in held.items():
        if (named := known.get("text")) is None:
            continue
        name = f"{model}/{arm}-{seed}.json"
        first = first or (named, f"of {name}")
        if named != first[0]:
            raise ValueError(
                f"{name}: was trained on and measured with other text (SHA-256 {named[:12]}, that {first[1]} is "
                f"{first[0][:12]}); arms are compared on the same. Delete it and run it again, or give the folder "
                "of its text as --data"
            )


def read_run(path: Path) -> tuple[EvaluationResult, dict[str, Any]]:
    """(evaluation, what is known of the run).

    Raises:
        ValueError: not a run's result, one of another version of the protocol, or of other questions.
    """
    held = read_json(path, "the result of a run of the experiment")
    if held.get("kind") != KIND:
        raise ValueError(f"{path}: kind is {held.get('kind')!r}; wanted {KIND!r}")
    for name, wanted in (("protocol", PROTOCOL), ("fingerprint", fingerprint(held["model"], held["arm"]))):
        if held[name] != wanted:
            raise ValueError(
                f"{path}: {name} is {held[name]}, that of protocol.md and arms.py {wanted}: it was made by another "
                "version of the experiment. Delete it, and run it again"
            )
    asked = {f"{each.row}.{each.language}": each for each in questions(split_for(held["seed"]))}
    if asked.keys() != held["choices"].keys():
        raise ValueError(
            f"{path}: holds {len(held['choices'])} answers; wanted those of {len(asked)} questions"
        )
    choices = [
        ChoiceOutcome(
            each.row,
            each.language,
            each.group,
            each.text,
            list(each.choices),
            each.choices.index(str(each.answer)),
            held["choices"][key],
        )
        for key, each in asked.items()
    ]
    perplexity = {code: Perplexity(each["nll"], each["tokens"]) for code, each in held["perplexity"].items()}
    modes = ("unshifted",) if held["area"] is None else ("unshifted", "shifted")
    result = EvaluationResult(
        model=f"{held['model']}, {held['arm']} {held['seed']}",
        pivot=PIVOT,
        area=held["area"],
        perplexity=dict.fromkeys(modes, perplexity),
        multiple_choice=dict.fromkeys(modes, choices),
        settings=held["settings"],
        versions=held["versions"],
    )
    return result, held
