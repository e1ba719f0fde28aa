#!/usr/bin/env python
"""Accuracy on the CLDR questions by language, without training and without a shift.

    python examples/real_models/cldr_accuracy.py gemma-3-270m --languages en,de,sw,tr --output results/

Writes ``cldr-<model>.json``: every choice's log-likelihood, the accuracies with Wilson intervals, and what they
were measured with. A language that the file already holds is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fetch import MODELS, fetch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shifcon_fast.data.cldr import KINDS, LANGUAGES, cldr_rows
from shifcon_fast.data.questions import read_questions
from shifcon_fast.evaluation.choice_scores import choice_accuracy
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome, measure_multiple_choice
from shifcon_fast.storage import read_json, write_json

_PACKAGES = ("shifcon-fast", "torch", "transformers", "babel")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="model", help=f"{' or '.join(MODELS)}; all unless given")
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    for name in options.models or MODELS:
        measure(name, options)


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one model, and write its file after every language and kind."""
    folder = fetch(name, options.cache)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = options.output / f"cldr-{name}.json"
    record: dict[str, Any] = read_json(path, "a record of CLDR accuracy") if path.is_file() else {}
    made_with = {
        "model": name,
        "dtype": options.dtype,
        "prompt": "label",
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    record = record or {**made_with, "accuracy": {}, "log_likelihoods": {}}
    if (record["model"], record["dtype"]) != (name, options.dtype):
        sys.exit(f"{path} was measured in {record['dtype']}; wanted {options.dtype}: write to another folder")
    for kind in options.kinds.split(","):
        for language in options.languages.split(","):
            done = record["accuracy"].setdefault(kind, {})
            if language in done:
                continue
            start = time.perf_counter()
            questions = read_questions(cldr_rows([language], kinds=[kind]))
            outcomes = measure_multiple_choice(model, tokenizer, questions, batch_size=options.batch_size)
            done[language] = summary(outcomes, language)
            record["log_likelihoods"].setdefault(kind, {})[language] = {
                str(outcome.row): [round(value, 4) for value in outcome.log_likelihoods]
                for outcome in outcomes
            }
            write_json(path, record)
            acc, norm = (done[language][measure]["estimate"] for measure in ("acc", "acc_norm"))
            print(
                f"{name} {kind:9} {language}: {len(outcomes)} questions, acc {acc:.1%}, acc_norm {norm:.1%} "
                f"({time.perf_counter() - start:.0f} s)",
                flush=True,
            )


def summary(outcomes: list[ChoiceOutcome], language: str) -> dict[str, Any]:
    """The two accuracies with their intervals."""
    return {
        "questions": len(outcomes),
        "acc": asdict(choice_accuracy(outcomes)[language]),
        "acc_norm": asdict(choice_accuracy(outcomes, normalised=True)[language]),
    }


def processor() -> str:
    """The processor's name and its widest instructions, as Linux has them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    level = next((each for each in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if each in flags), "")
    return f"{names[0]} ({len(names)} logical), {level}" if names else platform.processor()


if __name__ == "__main__":
    main()
