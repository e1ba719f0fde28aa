"""What an evaluation found, and its file.

Outcomes are kept item by item, so that two result files are enough for a paired bootstrap, on another day and
without either model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from shifcon_fast.evaluation.bootstrap import Interval, wilson_interval
from shifcon_fast.evaluation.choice_scores import choice_accuracy
from shifcon_fast.evaluation.exact_match import Outcome
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome
from shifcon_fast.evaluation.perplexity import Perplexity
from shifcon_fast.evaluation.retrieval import Retrieval
from shifcon_fast.json_record import JsonRecord

FILE_NAME = "evaluation.json"
Mode = Literal["unshifted", "shifted"]


class AttachedArea(TypedDict):
    """Where and how far an attached model shifts."""

    forward: int
    backward: int
    alpha: float
    recipe: str
    intervention: NotRequired[str]
    alphas: NotRequired[dict[str, float]]


@dataclass(frozen=True)
class EvaluationResult(JsonRecord):
    """Everything that :func:`shifcon_fast.evaluation.evaluate.evaluate` measured.

    Attributes:
        area: forward, backward, alpha, recipe and intervention of the attachment, and where languages have factors
            of alpha of their own, ``alphas``; None for a model that is not attached.
        retrieval, perplexity: by mode; ``shifted`` is there only for an attached model. Empty without
        parallel text. outcomes: one for every question to be answered freely; shifted where the model is attached.
        Empty without such questions. multiple_choice: by mode, one for every question with choices.
        settings: what the numbers depend on besides model and data.
    """

    KIND = "evaluation"
    FILE_NAME = FILE_NAME
    WANTED = f"the {FILE_NAME} that `shifcon evaluate` writes"

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


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity
