"""An evaluation in a model card: Markdown tables by language, and what the figures depend on."""

from __future__ import annotations

import re

from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.choice_scores import choice_accuracy
from shifcon_fast.evaluation.comparison import PairedComparison
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.markdown import block, prose, table


def evaluation_tables(result: EvaluationResult, comparison: PairedComparison | None = None) -> str:
    """Markdown of what was measured; intervals are of 95 %.

    Args:
        comparison: with another model, on the same items.
    """
    columns = _columns(result)
    languages = list(dict.fromkeys(code for column in columns.values() for code in column))
    rows = [[code, *(column.get(code, "–") for column in columns.values())] for code in languages]
    parts = [table(["language", *columns], rows), _settings(result)]
    if comparison is not None:
        parts += [f"Minus {prose(last_name(comparison.against))}, a paired bootstrap over the same items:"]
        parts += [_differences(comparison)]
    return "\n\n".join(part for part in parts if part)


def last_name(source: str) -> str:
    """What to call a file or folder to people who do not have it: the end of its path; other names as they are.

    A Hugging Face id (``org/name``) is a name; a path that looks like one is taken for it.
    """
    if re.fullmatch(r"[\w][\w.-]*/[\w.-]+", source) and not re.search(
        r"\.(jsonl?|csv|tsv|parquet)\b", source
    ):
        return source
    return [part for part in re.split(r"[\\/]", source) if part][-1] if source.strip("\\/") else source


def _columns(result: EvaluationResult) -> dict[str, dict[str, str]]:
    """What was measured → language → figure."""
    found: dict[str, dict[str, str]] = {}
    if result.outcomes:
        found["right answers"] = {code: _share(each) for code, each in result.accuracy().items()}
        found["in its language"] = {
            code: "–" if each is None else _share(each) for code, each in result.answer_language().items()
        }
    for mode, outcomes in result.multiple_choice.items():
        for name, normalised in (("acc", False), ("acc_norm", True)):
            scores = choice_accuracy(outcomes, normalised=normalised)
            found[f"{name} {mode}"] = {code: _share(each) for code, each in scores.items()}
    for mode, measured in result.perplexity.items():
        found[f"perplexity {mode}"] = {code: f"{each.value:.2f}" for code, each in measured.items()}
    for mode, retrieval in result.retrieval.items():
        found[f"MEXA {mode}"] = {
            code: f"{sum(each.mexa) / len(each.mexa):.2f}"
            for code, each in retrieval.scores.items()
            if each.mexa
        }
    return {name.replace("_", r"\_"): column for name, column in found.items()}


def _differences(comparison: PairedComparison) -> str:
    columns = {
        "right answers": {code: _change(each) for code, each in comparison.accuracy.items()},
        "acc": {code: _change(each) for code, each in comparison.choice_accuracy.items()},
        r"acc\_norm": {code: _change(each) for code, each in comparison.choice_accuracy_norm.items()},
        "log perplexity": {code: _change(each, 1, 3) for code, each in comparison.log_perplexity.items()},
    }
    columns = {name: column for name, column in columns.items() if column}
    languages = list(dict.fromkeys(code for column in columns.values() for code in column))
    rows = [[code, *(column.get(code, "–") for column in columns.values())] for code in languages]
    return table(["language", *columns], rows)


def _settings(result: EvaluationResult) -> str:
    settings = result.settings
    lines = [f"Measured on {prose(last_name(result.model))}, {result.mode}."]
    for name in ("parallel", "questions"):
        if settings.get(name):
            lines.append(f"{name.capitalize()}: {prose(last_name(str(settings[name])))}.")
    if settings.get("sentences"):
        lines.append(f"{settings['sentences']} sentences in each language.")
    if result.outcomes:
        lines.append(f"Greedy answers of at most {settings.get('max_new_tokens')} tokens.")
    shots = settings.get("few_shot") or {}
    if shots:
        lines.append(
            f"Worked examples: {prose(', '.join(f'{code} {count}' for code, count in shots.items()))}."
        )
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    text = " ".join([*lines, f"Versions: {prose(versions)}." if versions else ""]).rstrip()
    template = settings.get("prompt_template")
    asked = result.outcomes or result.multiple_choice
    if not asked or template in (None, "{question}"):
        return text
    shown = (
        template if isinstance(template, str) else "\n".join(f"{k}: {v}" for k, v in dict(template).items())
    )
    return f"{text}\n\nPrompts:\n\n{block(shown, 'text')}"


def _share(interval: Interval) -> str:
    return f"{interval.estimate:.1%} ({interval.low:.1%} … {interval.high:.1%})"


def _change(interval: Interval, unit: float = 100, digits: int = 1) -> str:
    low, high = (f"{unit * end:+.{digits}f}" for end in (interval.low, interval.high))
    noise = "" if interval.excludes_zero else ", within noise"
    return f"{unit * interval.estimate:+.{digits}f} ({low} … {high}{noise})"
