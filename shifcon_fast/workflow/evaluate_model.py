"""``shifcon evaluate``: one model or run, or two of them compared."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shifcon_fast.data.few_shot import read_few_shot, read_prompt_template
from shifcon_fast.data.languages import find_language
from shifcon_fast.data.parallel import find_pivot, read_parallel
from shifcon_fast.data.questions import read_questions
from shifcon_fast.evaluation.comparison import FILE_NAME as COMPARISON
from shifcon_fast.evaluation.comparison import compare
from shifcon_fast.evaluation.evaluate import evaluate as measure
from shifcon_fast.evaluation.exact_match import check_installed
from shifcon_fast.evaluation.result import FILE_NAME, EvaluationResult
from shifcon_fast.opening import is_run, open_model
from shifcon_fast.storage import replacing
from shifcon_fast.tables import comparison_table, result_table
from shifcon_fast.training.run.run_card import read_card

AGAINST = "against"
BESIDE_EVALUATION = (COMPARISON, f"{AGAINST}/{FILE_NAME}")
"""What lies beside ``evaluation.json`` where two were compared."""


def evaluate(
    model: str,
    output: Path,
    *,
    parallel: str | None = None,
    questions: str | None = None,
    against: str | None = None,
    languages: Sequence[str] | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    prompt_template: str = "{question}",
    few_shot: str | Path | None = None,
    stop_strings: Sequence[str] | None = None,
    choice_chat_template: bool = False,
    allow_missing: bool = False,
    trust_remote_code: bool = False,
    pivot: str | None = None,
    base: str | None = None,
) -> str:
    """Evaluate a model or run into ``evaluation.json``, and compare it with a second one if there is one.

    ``pivot``: None takes the run's, and ``en`` for other models. It is among the languages of the parallel text
    whether or not ``languages`` has it.
    """
    if parallel is None and questions is None:
        raise ValueError("parallel, questions: neither given; wanted at least one to measure on")
    if pivot is None:
        pivot = (read_card(model)["pivot"] if is_run(model) else None) or "en"
    text = None
    if parallel is not None:
        wanted = None if languages is None else list(languages)
        if wanted is not None and find_language(pivot, wanted) is None:
            wanted.insert(0, pivot)
        text = read_parallel(parallel, allow_missing=allow_missing, languages=wanted)
        pivot = find_pivot(pivot, text, parallel)
    asked = None
    if questions:
        asked = read_questions(questions, languages=languages, allow_missing=allow_missing)
        check_installed(asked)  # before a model is loaded
    settings: dict[str, Any] = {
        "parallel": text,
        "questions": asked,
        "pivot": pivot,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "prompt_template": read_prompt_template(prompt_template),
        "few_shot": read_few_shot(few_shot) if few_shot else None,
        "stop_strings": stop_strings,
        "choice_chat_template": choice_chat_template,
    }
    other = _earlier_result(against) if against else None  # it may lie in the folder that is written to
    options: dict[str, Any] = {
        "quantization": quantization,
        "dtype": dtype or _dtype_of_the_run(model, against),
        "trust_remote_code": trust_remote_code,
        "base": base,
    }
    sources = {"parallel": parallel, "questions": questions}
    result = _measure(model, settings, options, sources)
    with replacing(output, FILE_NAME, BESIDE_EVALUATION) as staging:
        result.save(staging)
    lines = [result_table(result)]
    if against is not None:
        boundary = next((found.matrix_boundary for found in result.retrieval.values()), None)
        other = other or _measure(against, {**settings, "matrix_boundary": boundary}, options, sources)
        comparison = compare(result, other)
        with replacing(output, FILE_NAME, BESIDE_EVALUATION) as staging:
            result.save(staging)
            other.save(staging / AGAINST)
            comparison.save(staging)
        lines += ["", comparison_table(comparison), *_asked_otherwise(result, other)]
    return "\n".join([*lines, "", f"written to {output}; `shifcon report {output}` makes a page of it"])


def _measure(
    model: str, settings: dict[str, Any], options: dict[str, Any], sources: dict[str, str | None]
) -> EvaluationResult:
    """Evaluate; the result names the model and the files as the user did, not as what they were read into."""
    loaded, tokenizer = open_model(model, **options)
    result = measure(loaded, tokenizer, **settings)
    del loaded
    gc.collect()  # where accelerate has put device hooks on a model they lead back to it, and keep its memory
    return replace(result, model=model, settings={**result.settings, **sources})


def _dtype_of_the_run(*models: str | None) -> str | None:
    """That of the first run among them, so that a run and its base are compared in one dtype; None without one."""
    return next((read_card(each)["dtype"] for each in models if each and is_run(each)), None)


def _earlier_result(folder: str) -> EvaluationResult | None:
    """The result that an evaluation folder holds; None for a model or a run."""
    is_evaluation = (Path(folder) / FILE_NAME).is_file() and not is_run(folder)
    return EvaluationResult.load(folder) if is_evaluation else None


def _asked_otherwise(result: EvaluationResult, other: EvaluationResult) -> list[str]:
    """A line that says which settings of an earlier result differ, where they change the answers."""
    names = [
        name
        for name in ("prompt_template", "few_shot", "max_new_tokens")
        if result.outcomes and result.settings.get(name) != other.settings.get(name)
    ]
    return [f"note: the two differ in {', '.join(names)}: they were not asked the same"] * bool(names)
