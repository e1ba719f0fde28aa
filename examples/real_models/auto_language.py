#!/usr/bin/env python
"""How often ``language = "auto"`` finds the language of a text, and what looking costs.

    python examples/real_models/auto_language.py gemma-3-270m --parallel ntrex128.jsonl --test flores200.jsonl

Estimates a language space on the first rows of one multi-parallel file, attaches in the middle third, and has the
model tell the language of the rows of another file (which is for evaluation only), whole and cut to their first
words.
Writes ``auto-MODEL.json``: by language, the share that was found among all rows, the share of rows that reached the
threshold, and the share of those that were right. The cost is the time of a pass in which rows look, over one in
which their language is said, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cldr_accuracy import processor
from fetch import fetch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shifcon_fast as sf
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.storage import write_json
from shifcon_fast.version import package_versions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="smollm2-135m-instruct or gemma-3-270m")
    parser.add_argument(
        "--parallel", type=Path, required=True, help="multi-parallel JSON Lines, to estimate on"
    )
    parser.add_argument(
        "--test", type=Path, required=True, help="multi-parallel JSON Lines, to be told apart"
    )
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the results")
    parser.add_argument("--sentences", type=int, default=200, help="of each language, to estimate on")
    parser.add_argument("--rows", type=int, default=200, help="of each language, to be told apart")
    parser.add_argument("--words", type=int, nargs="+", default=[4, 8], help="lengths of the cut texts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    write_json(options.output / f"auto-{options.model}.json", measure(options))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the file holds."""
    folder = fetch(options.model, None)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    text, test = read_parallel(options.parallel), read_parallel(options.test)
    space = sf.estimate_space(
        model, tokenizer, {code: each[: options.sentences] for code, each in text.items()}
    )
    third = space.num_boundaries // 3
    handle = sf.attach(model, space, third, 2 * third)
    tests = {"whole sentences": {code: each[: options.rows] for code, each in test.items()}}
    for words in options.words:
        tests[f"first {words} words"] = {
            code: [first_words(each, words) for each in rows]
            for code, rows in tests["whole sentences"].items()
        }
    return {
        "model": options.model,
        "area": [handle.forward, handle.backward],
        "threshold": handle.threshold,
        "estimated on": {"file": options.parallel.name, "sentences": options.sentences},
        "told apart": {"file": options.test.name, "rows": options.rows},
        "found": {
            name: {code: told_apart(model, tokenizer, handle, code, rows) for code, rows in texts.items()}
            for name, texts in tests.items()
        },
        "time of a pass, auto / said": cost(model, tokenizer, handle, test["en"][:16]),
        "dtype": options.dtype,
        "processor": processor(),
        "versions": package_versions(),
    }


def first_words(text: str, words: int) -> str:
    """The beginning of a text; where words are not set apart, as in Japanese or Thai, about as many letters."""
    parts = text.split()
    return " ".join(parts[:words]) if len(parts) > words else text[: 3 * words]


@torch.no_grad()
def told_apart(
    model: Any, tokenizer: Any, handle: ShiftHandle, code: str, rows: Sequence[str]
) -> dict[str, Any]:
    """Shares of rows; and which languages the wrong ones were taken for."""
    found: list[tuple[str, float]] = []
    with handle.use("auto"):
        for start in range(0, len(rows), 16):
            model(
                **tokenizer(list(rows[start : start + 16]), return_tensors="pt", padding=True),
                logits_to_keep=1,
            )
            found += handle.detected
    sure = [language for language, p in found if p >= handle.threshold]
    wrong = [language for language, _ in found if language != code]
    return {
        "right": 1 - len(wrong) / len(found),
        "reached the threshold": len(sure) / len(found),
        "right of those": sum(language == code for language in sure) / max(1, len(sure)),
        "taken for": {each: wrong.count(each) for each in sorted(set(wrong), key=wrong.count, reverse=True)},
    }


@torch.no_grad()
def cost(model: Any, tokenizer: Any, handle: ShiftHandle, rows: Sequence[str]) -> dict[str, float]:
    """Medians of 15 passes each, in turns: the ratio and the seconds."""
    batch = tokenizer(list(rows), return_tensors="pt", padding=True)
    seconds: dict[str, list[float]] = {"auto": [], "sw": []}
    for turn in range(16):
        for language, times in seconds.items():
            with handle.use(language):
                start = time.perf_counter()
                model(**batch)
                if turn:
                    times.append(time.perf_counter() - start)
    auto, said = (statistics.median(times) for times in seconds.values())
    return {"ratio": auto / said, "seconds": said}


if __name__ == "__main__":
    main()
