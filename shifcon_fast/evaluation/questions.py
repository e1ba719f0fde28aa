"""Exact match on questions, by greedy generation.

An answer that is a number is compared as a number (the last one of the response, see
:mod:`shifcon_fast.evaluation.numeric`), exactly: 18 = 18.0, but 3.33 ≠ 10/3. Any other answer is compared as
a string after NFKC, case folding, joining white space and taking off punctuation at the ends.

Prompts are built by :func:`shifcon_fast.data.prompts.encode_prompt`, as in training: through the tokenizer's
chat template where it has one.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from shifcon_fast.data.instructions import Turn
from shifcon_fast.data.languages import find_language, primary_code
from shifcon_fast.data.prompts import encode_prompt
from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.answer_language import AnswerLanguage, can_be_told
from shifcon_fast.evaluation.numeric import as_number, extract_answer, format_number
from shifcon_fast.evaluation.sentences import context_length, input_device
from shifcon_fast.modeling.attach import ShiftHandle
from shifcon_fast.modeling.vocabulary import check_token_ids, embedding_rows, padding_id

logger = logging.getLogger(__name__)
T = TypeVar("T")

Templates = str | Mapping[str, str]
"""A text with ``{question}`` in it, for all languages or one for each."""

FewShot = Mapping[str, Sequence[tuple[str, str]]]
"""language → worked (question, response) pairs that come before the question."""


@dataclass(frozen=True)
class Outcome:
    """What became of one question.

    Attributes:
        row, language: which question; together unique.
        answer: the gold answer as text.
        parsed: what was read out of the response; None where a number was wanted and none was there.
        in_language: whether the response is in the question's language; None where that cannot be told
            (too short, no letters, or a language that py3langid does not know).
    """

    row: int
    language: str
    prompt: str
    response: str
    answer: str
    parsed: str | None
    correct: bool
    in_language: bool | None


@torch.no_grad()
def answer_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    handle: ShiftHandle | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    prompt_template: Templates = "{question}",
    few_shot: FewShot | None = None,
    stop_strings: Sequence[str] = (),
    progress: bool = False,
) -> list[Outcome]:
    """Answer every question greedily; outcomes in the order of the questions.

    Batches may mix languages; with a handle, each row is shifted by its own. They are sorted by length and
    padded on the left. Generation stops at EOS, at a stop string (which is cut off, with what follows), or
    after ``max_new_tokens``.

    Raises:
        ValueError: a template without ``{question}``, or for another language only; a prompt that leaves no
            room in the model's context; two questions with the same row and language.
    """
    if not questions:
        return []
    check_unique(questions)
    asked = dict.fromkeys(question.language for question in questions)
    identifier = AnswerLanguage([language for language in asked if can_be_told(language)])
    if untold := [language for language in asked if language not in identifier.languages]:
        logger.warning(
            "The language of answers in %s is not judged: py3langid does not know it", ", ".join(untold)
        )
    prompts = [
        encode_prompt(tokenizer, prompt_turns(question, prompt_template, few_shot or {}))
        for question in questions
    ]
    limit = context_length(model)
    rows_of_model = embedding_rows(model)
    for question, prompt in zip(questions, prompts, strict=True):
        check_token_ids(prompt, tokenizer, rows_of_model, f"question {question.row} ({question.language})")
        if limit is not None and len(prompt) >= limit:
            raise ValueError(
                f"question {question.row} ({question.language}) makes a prompt of {len(prompt)} tokens; the "
                f"model's context holds {limit}, answer included: shorten it, or give fewer worked examples"
            )
    outcomes: dict[int, Outcome] = {}
    order = sorted(range(len(questions)), key=lambda index: -len(prompts[index]))
    bar = tqdm(total=len(questions), desc="questions", disable=not progress, leave=False)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = len(prompts[rows[0]])
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - longest)
        responses = _generate(
            model,
            tokenizer,
            [prompts[index] for index in rows],
            [questions[index].language for index in rows],
            handle=handle,
            max_new_tokens=room,
            stop_strings=stop_strings,
        )
        for index, response in zip(rows, responses, strict=True):
            text = tokenizer.decode(prompts[index], skip_special_tokens=False)
            outcomes[index] = _judge(questions[index], text, response, identifier)
        bar.update(len(rows))
    bar.close()
    return [outcomes[index] for index in range(len(questions))]


def is_correct(response: str, answer: int | float | str, language: str) -> tuple[bool, str | None]:
    """Whether a response gives the answer, and what was read out of it."""
    gold = as_number(answer)
    if gold is not None:
        number = extract_answer(response, primary_code(language))
        return number == gold, None if number is None else format_number(number)
    return normalise_text(response) == normalise_text(str(answer)), normalise_text(response)


def normalise_text(text: str) -> str:
    """NFKC, case folded, white space joined, and no white space or punctuation at the ends."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("".join({c for c in text if unicodedata.category(c).startswith(("P", "Z"))}))


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    languages: Sequence[str],
    *,
    handle: ShiftHandle | None,
    max_new_tokens: int,
    stop_strings: Sequence[str],
) -> list[str]:
    device = input_device(model)
    padding = padding_id(tokenizer, embedding_rows(model))
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[padding] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    extra: dict[str, Any] = {}
    if handle is not None:
        extra["language_ids"] = handle.language_ids(list(languages)).to(device)
    if stop_strings:
        extra["stopping_criteria"] = StoppingCriteriaList([_StopStrings(tokenizer, stop_strings, longest)])
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=padding,
        **extra,
    )
    responses = []
    for ids in generated[:, longest:].tolist():
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ends = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
        responses.append(text[: min(ends)].strip() if ends else text.strip())
    return responses


class _StopStrings(StoppingCriteria):
    """Ends a row once its decoded answer holds a stop string.

    transformers' own criterion works on the strings of single tokens, and fails on tokenizers whose tokens are
    never parts of a word.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop_strings, self.start = tokenizer, tuple(stop_strings), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = [
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in input_ids[:, self.start :].tolist()
        ]
        ended = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def prompt_turns(question: Question, templates: Templates, few_shot: FewShot) -> list[Turn]:
    """The worked examples of the question's language, then the question in its template.

    Raises:
        ValueError: a template without ``{question}``, or for other languages only.
    """
    template = templates if isinstance(templates, str) else _of_language(templates, question.language)
    if template is None:
        raise ValueError(
            f"prompt_template has no entry for {question.language!r}; it has {', '.join(templates)}"
        )
    if "{question}" not in template:
        raise ValueError(f"prompt_template is {template!r}; wanted a text with {{question}} in it")
    turns = []
    for example, response in _of_language(few_shot, question.language) or ():
        turns += [Turn("user", template.replace("{question}", example)), Turn("assistant", response)]
    return [*turns, Turn("user", template.replace("{question}", question.text))]


def _of_language(values: Mapping[str, T], language: str) -> T | None:
    """The entry of a language, however its code is written there."""
    found = find_language(language, values)
    return None if found is None else values[found]


def _judge(question: Question, prompt: str, response: str, identifier: AnswerLanguage) -> Outcome:
    correct, parsed = is_correct(response, question.answer, question.language)
    gold = as_number(question.answer)
    return Outcome(
        row=question.row,
        language=question.language,
        prompt=prompt,
        response=response,
        answer=str(question.answer) if gold is None else format_number(gold),
        parsed=parsed,
        correct=correct,
        in_language=(
            identifier.agrees(response, question.language)
            if question.language in identifier.languages
            else None
        ),
    )


def check_unique(questions: Sequence[Question]) -> None:
    """Raise ValueError where two questions have the same row and language."""
    seen: set[tuple[int, str]] = set()
    for question in questions:
        if (key := (question.row, question.language)) in seen:
            raise ValueError(
                f"questions has row {key[0]} in {key[1]!r} twice; two models' results are paired by row and "
                "language: give every question its own row"
            )
        seen.add(key)
