"""What one layer area does to a model: perplexity, retrieval inside the area, answers, dose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.exact_match import answer_questions
from shifcon_fast.evaluation.multiple_choice import measure_multiple_choice
from shifcon_fast.evaluation.perplexity import Perplexity, measure_perplexity
from shifcon_fast.evaluation.retrieval import retrieval_scores, sentence_representations
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.space.intervention import InterventionName
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import Scores


class EffectMeter:
    """Runs one model over sentences and questions, with a shift or without.

    Args:
        text: language → sentences, aligned; the pivot's are needed for retrieval.
        asked: sorted by language.

    Attributes:
        step: called with 1 after each pass over one language's data.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        space: LanguageSpace,
        text: Mapping[str, Sequence[str]],
        asked: Sequence[Question],
        *,
        intervention: InterventionName = "mean",
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self._intervention = intervention
        self.space = space
        self.step: Callable[[int], object] = lambda passes: None
        self._tokenizer = tokenizer
        self._pivot = text[space.pivot]
        self._text = {language: found for language, found in text.items() if language != space.pivot}
        self._asked = asked
        self._common: dict[str, Any] = {"batch_size": batch_size, "progress": False}
        self._max_new_tokens = max_new_tokens
        self._of_pivot: Tensor | None = None

    @property
    def asks(self) -> int:
        """Passes over questions for one area."""
        return len({question.language for question in self._asked} - {self.space.pivot})

    def rows(self) -> dict[str, list[int]]:
        """language → numbers of its questions."""
        return {language: [each.row for each in found] for language, found in self._by_language().items()}

    def attached(self, forward: int, backward: int, alpha: float) -> ShiftHandle:
        """The model, attached for an area; leaving the handle's context detaches it."""
        return attach(self.model, self.space, forward, backward, alpha, intervention=self._intervention)

    def dose(self, handle: ShiftHandle) -> dict[str, list[float]]:
        """language → how far hidden states are moved at both ends against the median one."""
        return {language: list(handle.shift.dose(language)) for language in self._text}

    def perplexity(self, handle: ShiftHandle | None) -> dict[str, Perplexity]:
        """language → scored sentences."""
        found = {}
        for language, sentences in self._text.items():
            found[language] = measure_perplexity(
                self.model, self._tokenizer, sentences, language=language, handle=handle, **self._common
            )
            self.step(1)
        return found

    def retrieval(self, first: int, handle: ShiftHandle | None = None) -> dict[str, Scores]:
        """language → scores against the pivot at boundaries first … L−2."""
        boundaries = list(range(first, self.space.num_boundaries - 1))
        if self._of_pivot is None:
            inner = range(self.space.num_boundaries - 1)
            self._of_pivot = self._representations(self.space.pivot, self._pivot, list(inner), None)
        scores: dict[str, Scores] = {}
        for language, sentences in self._text.items():
            own = self._representations(language, sentences, boundaries, handle)
            found = retrieval_scores(own, self._of_pivot[first:])
            scores[language] = Scores(
                to_pivot=[each[0] for each in found],
                from_pivot=[each[1] for each in found],
                mexa=[each[2] for each in found],
            )
            self.step(1)
        return scores

    def answers(self, handle: ShiftHandle | None, destroyed: Collection[str] = ()) -> dict[str, list[bool]]:
        """language → right or not, for every question; without the pivot where the model is shifted.

        Questions with choices are right where the right one is the most likely; others by generation.

        Args:
            destroyed: languages in which the model's logits are not finite: nothing is right there.
        """
        right = {}
        for language, questions in self._by_language().items():
            if handle is not None and language == self.space.pivot:
                continue
            correct = {} if language in destroyed else self._correct(questions, handle)
            right[language] = [correct.get(question.row, False) for question in questions]
            if handle is not None:
                self.step(1)
        return right

    def _correct(self, questions: Sequence[Question], handle: ShiftHandle | None) -> dict[int, bool]:
        chosen = measure_multiple_choice(
            self.model,
            self._tokenizer,
            [each for each in questions if each.choices],
            handle=handle,
            **self._common,
        )
        generated = answer_questions(
            self.model,
            self._tokenizer,
            [each for each in questions if not each.choices],
            handle=handle,
            max_new_tokens=self._max_new_tokens,
            **self._common,
        )
        return {each.row: each.correct for each in chosen} | {each.row: each.correct for each in generated}

    def _representations(
        self, language: str, sentences: Sequence[str], boundaries: Sequence[int], handle: ShiftHandle | None
    ) -> Tensor:
        return sentence_representations(
            self.model,
            self._tokenizer,
            sentences,
            boundaries,
            language=language,
            handle=handle,
            **self._common,
        )

    def _by_language(self) -> dict[str, list[Question]]:
        found: dict[str, list[Question]] = {}
        for question in self._asked:
            found.setdefault(question.language, []).append(question)
        return found
