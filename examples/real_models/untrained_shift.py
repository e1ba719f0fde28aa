#!/usr/bin/env python
"""What the shift does to a model that was not trained with it: sweep over layer areas, and CLDR answers.

    python examples/real_models/untrained_shift.py gemma-3-270m --parallel ntrex128.jsonl --output results/

Estimates a language space on the first 200 rows of a multi-parallel file, sweeps the layer areas on later rows
and on the CLDR questions of the *dev* territories, and asks those of the *test* territories unshifted and
shifted: at the area that the distances propose, and at the mildest area of the sweep (or the one it
recommends). Writes ``sweep-MODEL.json``, ``sweep-MODEL.png`` and ``answers-MODEL.json``. The sweep goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cldr_accuracy import processor
from fetch import fetch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shifcon_fast as sf
from shifcon_fast.data.cldr import cldr_rows
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.data.questions import Question, read_questions
from shifcon_fast.evaluation.choice_scores import choice_accuracy, choice_differences
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome, measure_multiple_choice
from shifcon_fast.evaluation.sweep_plot import sweep_plot
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.space.area import propose_area
from shifcon_fast.storage import write_json
from shifcon_fast.version import package_versions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="smollm2-135m-instruct or gemma-3-270m")
    parser.add_argument("--parallel", type=Path, required=True, help="multi-parallel JSON Lines")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the results")
    parser.add_argument("--languages", default="en,de,fr,sw,tr,hi")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--sentences", type=int, default=24, help="of each language, for the sweep")
    parser.add_argument("--questions", type=int, default=30, help="of each language, for the sweep")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    measure(options)


def measure(options: argparse.Namespace) -> None:
    """Space, sweep, answers, and their files."""
    languages = options.languages.split(",")
    folder = fetch(options.model, None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    model.config._name_or_path = options.model  # the folder's place is this machine's
    text = read_parallel(options.parallel, languages=languages)
    space = sf.estimate_space(
        model, tokenizer, {code: each[:200] for code, each in text.items()}, pivot=languages[0]
    )
    proposed = propose_area(space)
    work = options.output / f"sweep-{options.model}"
    sweep = sf.sweep_area(
        model,
        tokenizer,
        space,
        {code: each[200:] for code, each in text.items()},
        read_questions(cldr_rows(languages, split="dev")),
        alpha=options.alpha,
        sentences=options.sentences,
        max_questions=options.questions,
        output=work,
    )
    decided = sf.recommend_area(space, alpha=options.alpha)
    mildest = min(sweep.areas, key=lambda area: sweep.worst(area)[1])
    chosen = decided.span or (mildest.forward, mildest.backward)
    picture = sweep_plot(sweep, chosen=decided.span, file_format="png")
    (options.output / f"sweep-{options.model}.png").write_bytes(picture)

    questions = read_questions(cldr_rows(languages, split="test"))
    unshifted = measure_multiple_choice(model, tokenizer, questions, batch_size=32, progress=True)
    areas = {"proposed": proposed.span, "recommended" if decided.span else "mildest": chosen}
    answers = {}
    for name, span in areas.items():
        if span is not None:
            with sf.attach(model, space, forward=span[0], backward=span[1], alpha=options.alpha) as handle:
                answers[name] = {"area": span, **_shifted(model, tokenizer, handle, questions, unshifted)}
    path = options.output / f"answers-{options.model}.json"
    write_json(
        path,
        {
            "kind": "untrained_shift",
            "model": options.model,
            "data": options.parallel.name,
            "questions": "CLDR, test territories",
            "alpha": options.alpha,
            "dtype": options.dtype,
            "processor": processor(),
            "versions": {"python": platform.python_version(), **package_versions()},
            "proposal": proposed.reason,
            "decision": decided.reason,
            "doses": {
                name: {code: [space.dose(k, code, options.alpha) for k in span] for code in languages[1:]}
                for name, span in areas.items()
                if span is not None
            },
            "unshifted": _summary(unshifted),
            **answers,
        },
    )
    print(decided.reason)
    print(path)


def _shifted(
    model: Any,
    tokenizer: Any,
    handle: ShiftHandle,
    questions: Sequence[Question],
    unshifted: Sequence[ChoiceOutcome],
) -> dict[str, Any]:
    outcomes = measure_multiple_choice(
        model, tokenizer, questions, handle=handle, batch_size=32, progress=True
    )
    differences = {
        name: {
            code: asdict(each)
            for code, each in choice_differences(outcomes, unshifted, normalised=name == "acc_norm").items()
        }
        for name in ("acc", "acc_norm")
    }
    return {**_summary(outcomes), "minus_unshifted": differences}


def _summary(outcomes: Sequence[ChoiceOutcome]) -> dict[str, Any]:
    """Accuracy by language with Wilson intervals, and every choice's log-likelihood."""
    likelihoods: dict[str, dict[str, list[float]]] = {}
    for each in outcomes:
        scores = [round(value, 3) for value in each.log_likelihoods]
        likelihoods.setdefault(each.language, {})[str(each.row)] = scores
    return {
        "acc": {code: asdict(each) for code, each in choice_accuracy(outcomes).items()},
        "acc_norm": {code: asdict(each) for code, each in choice_accuracy(outcomes, normalised=True).items()},
        "log_likelihoods": likelihoods,
    }


if __name__ == "__main__":
    main()
