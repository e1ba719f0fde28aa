"""What an evaluation found, its file, and the comparison of two of them.

Outcomes are kept item by item, so that two result files are enough for a paired bootstrap, on another day and
without either model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from typing_extensions import TypedDict

from shifcon_fast.data.languages import find_language
from shifcon_fast.evaluation.bootstrap import Interval, paired_interval, ratio_interval, wilson_interval
from shifcon_fast.evaluation.choice_scores import choice_accuracy, choice_differences
from shifcon_fast.evaluation.exact_match import Outcome
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome
from shifcon_fast.evaluation.perplexity import Perplexity
from shifcon_fast.evaluation.retrieval import Retrieval
from shifcon_fast.storage import read_json, write_json

FILE_NAME = "evaluation.json"
FORMAT_VERSION = 1
Mode = Literal["unshifted", "shifted"]
T = TypeVar("T")


class AttachedArea(TypedDict):
    """Where and how far an attached model shifts."""

    forward: int
    backward: int
    alpha: float
    recipe: str


@dataclass(frozen=True)
class EvaluationResult:
    """Everything that :func:`shifcon_fast.evaluation.evaluate.evaluate` measured.

    Attributes:
        area: forward, backward, alpha and recipe of the attachment; None for a model that is not attached.
        retrieval, perplexity: by mode; ``shifted`` is there only for an attached model. Empty without
        parallel text. outcomes: one for every question to be answered freely; shifted where the model is attached.
        Empty without such questions. multiple_choice: by mode, one for every question with choices.
        settings: what the numbers depend on besides model and data.
    """

    model: str
    pivot: str
    area: AttachedArea | None
    retrieval: dict[str, Retrieval] = field(default_factory=dict)
    perplexity: dict[str, dict[str, Perplexity]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    multiple_choice: dict[str, list[ChoiceOutcome]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        measured: dict[str, dict[str, Any]] = {
            "retrieval": dict(self.retrieval),
            "perplexity": dict(self.perplexity),
            "multiple_choice": dict(self.multiple_choice),
        }
        for name, modes in measured.items():
            wanted = {"unshifted", self.mode}
            if modes and modes.keys() != wanted:
                raise ValueError(f"{name}: got the modes {list(modes)}; wanted {sorted(wanted)}")
        if len({(tuple(each.scores), *each.boundaries) for each in self.retrieval.values()}) > 1:
            raise ValueError("retrieval: wanted the same languages and boundaries in both modes")
        if len({tuple(languages) for languages in self.perplexity.values()}) > 1:
            raise ValueError("perplexity: wanted the same languages in both modes")
        asked = {
            tuple((outcome.row, outcome.language) for outcome in outcomes)
            for outcomes in self.multiple_choice.values()
        }
        if len(asked) > 1:
            raise ValueError("multiple_choice: wanted the same questions in both modes")

    @property
    def mode(self) -> Mode:
        """How the model runs when it is used: shifted where it is attached."""
        return "unshifted" if self.area is None else "shifted"

    def accuracy(self) -> dict[str, Interval]:
        """Language → share of questions answered right, with its Wilson interval."""
        return {
            code: wilson_interval([o.correct for o in items]) for code, items in self.by_language().items()
        }

    def answer_language(self) -> dict[str, Interval | None]:
        """Language → share of the decided answers that are in the right language; None where none is decided."""
        decided = {
            code: [o.in_language for o in items if o.in_language is not None]
            for code, items in self.by_language().items()
        }
        return {code: wilson_interval(values) if values else None for code, values in decided.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the measurements, and a ``summary`` for human readers that is not read back."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": "evaluation",
            **asdict(self),
            "summary": self._summary(),
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``evaluation.json`` into the folder, atomically; its path."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read a folder's ``evaluation.json``, or the file itself.

        Raises:
            ValueError: no such file, or not an evaluation.
        """
        return read_json(
            Path(path) / FILE_NAME if Path(path).is_dir() else path,
            f"the {FILE_NAME} that `shifcon evaluate` writes",
            cls,
            wanted={"kind": "evaluation", "format_version": FORMAT_VERSION},
        )

    def by_language(self) -> dict[str, list[Outcome]]:
        """Language → its outcomes, in the order of the questions."""
        languages: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            languages.setdefault(outcome.language, []).append(outcome)
        return languages

    def _summary(self) -> dict[str, Any]:
        return {
            "accuracy": {code: asdict(interval) for code, interval in self.accuracy().items()},
            "answer_language": {
                code: interval and asdict(interval) for code, interval in self.answer_language().items()
            },
            "multiple_choice": {
                mode: {
                    name: {
                        code: asdict(interval)
                        for code, interval in choice_accuracy(outcomes, normalised=normalised).items()
                    }
                    for name, normalised in (("acc", False), ("acc_norm", True))
                }
                for mode, outcomes in self.multiple_choice.items()
            },
            "perplexity": {
                mode: {code: _finite(found.value) for code, found in languages.items()}
                for mode, languages in self.perplexity.items()
            },
            "mean_mexa": {
                mode: {code: _mean(scores.mexa) for code, scores in found.scores.items()}
                for mode, found in self.retrieval.items()
            },
        }


@dataclass(frozen=True)
class PairedComparison:
    """One model minus another on the same items, language by language.

    Attributes:
        accuracy: difference of the shares of right answers.
        log_perplexity: difference of the mean negative log-likelihoods (nats a token); below zero is better.
            exp of it is the ratio of the perplexities. Only for languages on which both models predicted the
            same tokens.
        choice_accuracy, choice_accuracy_norm: difference of the shares of right choices, of the greatest
            log-likelihood, and of the greatest per character.
    """

    model: str
    against: str
    accuracy: dict[str, Interval]
    log_perplexity: dict[str, Interval]
    choice_accuracy: dict[str, Interval] = field(default_factory=dict)
    choice_accuracy_norm: dict[str, Interval] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"format_version": FORMAT_VERSION, "kind": "comparison", **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> PairedComparison:
        """Read a file that holds :meth:`to_json`.

        Raises:
            ValueError: no such file, or not a comparison.
        """
        return read_json(
            path,
            "the comparison that `shifcon evaluate --against` writes",
            cls,
            wanted={"kind": "comparison", "format_version": FORMAT_VERSION},
        )


def compare(
    result: EvaluationResult,
    against: EvaluationResult,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """``result − against`` with paired bootstrap intervals, over the languages that both were measured in.

    Each model counts as it is used: shifted where it is attached.

    Raises:
        ValueError: nothing in common, or other questions in a language.
    """
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    measured = result.perplexity.values()
    codes = list(dict.fromkeys([*result.by_language(), *(code for mode in measured for code in mode)]))
    ours, theirs = result.by_language(), _as_named(against.by_language(), codes)
    accuracy = {}
    for code in [code for code in ours if code in theirs]:
        first = {outcome.row: outcome for outcome in ours[code]}
        second = {outcome.row: outcome for outcome in theirs[code]}
        if {row: o.answer for row, o in first.items()} != {row: o.answer for row, o in second.items()}:
            raise ValueError(
                f"against: the two results hold different questions in {code!r} ({len(first)} and {len(second)}); "
                "evaluate both on the same file"
            )
        accuracy[code] = paired_interval(
            [o.correct for o in first.values()], [second[row].correct for row in first], **options
        )
    scored = result.perplexity.get(result.mode, {})
    other = _as_named(against.perplexity.get(against.mode, {}), codes)
    log_perplexity = {
        code: _log_ratio(scored[code], other[code], options)
        for code in scored
        if code in other and scored[code].tokens == other[code].tokens
    }
    choices, choices_norm = (
        choice_differences(
            result.multiple_choice.get(result.mode, []),
            against.multiple_choice.get(against.mode, []),
            normalised=normalised,
            **options,
        )
        for normalised in (False, True)
    )
    if not accuracy and not log_perplexity and not choices:
        raise ValueError(
            "against: the two results have no question and no sentence in common; evaluate both on the same files"
        )
    return PairedComparison(result.model, against.model, accuracy, log_perplexity, choices, choices_norm)


def _as_named(values: Mapping[str, T], codes: Sequence[str]) -> dict[str, T]:
    """The values under the spelling that ``codes`` has of their languages, where it has one."""
    return {find_language(code, codes) or code: value for code, value in values.items()}


def _log_ratio(first: Perplexity, second: Perplexity, options: Mapping[str, Any]) -> Interval:
    scored = [
        (a - b, tokens) for a, b, tokens in zip(first.nll, second.nll, first.tokens, strict=True) if tokens
    ]
    return ratio_interval([d for d, _ in scored], [tokens for _, tokens in scored], **options)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity
