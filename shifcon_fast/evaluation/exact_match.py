"""Exact match on questions, by greedy generation; what is right: :mod:`shifcon_fast.evaluation.grading`.

Prompts are built by :func:`shifcon_fast.data.prompts.encode_prompt`, as in training: through the tokenizer's
chat template where it has one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from shifcon_fast.data.chat_template import NOTHING_ENDS_A_TURN, end_of_turn, stopping_ids
from shifcon_fast.data.few_shot import PLACE
from shifcon_fast.data.instructions import Turn
from shifcon_fast.data.languages import find_language, primary_code
from shifcon_fast.data.prompts import encode_prompt
from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.answer_language import AnswerLanguage, can_be_told
from shifcon_fast.evaluation.answer_words import ANSWER_WORDS, TURN_TOKENS, TURNS
from shifcon_fast.evaluation.grading import Gold, is_correct, read_gold
from shifcon_fast.evaluation.sentences import context_length, input_device
from shifcon_fast.extras import needed_for
from shifcon_fast.modeling.attachment import unshifted
from shifcon_fast.modeling.contiguous_head import contiguous_head
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.modeling.vocabulary import check_token_ids, embedding_rows, padding_id
from shifcon_fast.notices import warn_once

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


def check_installed(questions: Iterable[Question]) -> None:
    """Raise where open questions are to be answered, and a package that reads the answers is not installed.

    ``answer_questions`` would as well, after whatever was measured before.

    Raises:
        MissingExtraError: it names the extra.
    """
    if any(not question.choices for question in questions):
        with needed_for("reading answers to open questions"):
            import babel  # noqa: F401
            import py3langid  # noqa: F401


@torch.no_grad()
def answer_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    handle: ShiftHandle | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    prompt_template: Templates = PLACE,
    few_shot: FewShot | None = None,
    stop_strings: Sequence[str] | None = None,
    progress: bool = False,
) -> list[Outcome]:
    """Answer every question greedily; outcomes in the order of the questions.

    Batches may mix languages; with a handle, each row is shifted by its own, and without one none is. They are
    sorted by length and padded on the left. Generation stops where the tokenizer's chat template ends a turn (see
    :func:`shifcon_fast.data.chat_template.end_of_turn`), at the model's own EOS tokens, at a stop string (which is
    cut off, with what follows), or after ``max_new_tokens``.

    Args:
        prompt_template: see :data:`Templates`; worked examples go through it as well, and what they already hold of
            it (``Question:``, ``Step-by-Step Answer:``) is not said twice.
        stop_strings: None takes :func:`default_stop_strings`; an empty sequence none.

    Raises:
        ValueError: a template without ``{question}``, or for another language only; worked examples, but none in
            a question's language; an empty stop string; an answer that is none; a prompt that leaves no room in the
            model's context; two questions with the same row and language.
    """
    if not questions:
        return []
    check_unique(questions)
    golds = [_gold(question) for question in questions]
    asked = dict.fromkeys(question.language for question in questions)
    identifier = AnswerLanguage([language for language in asked if can_be_told(language)])
    if untold := [language for language in asked if language not in identifier.languages]:
        logger.warning(
            "The language of answers in %s is not judged: py3langid does not know it", ", ".join(untold)
        )
    if stop_strings is None:
        stop_strings = default_stop_strings(tokenizer, asked, prompt_template, few_shot)
    if not all(stop_strings):
        raise ValueError(f"stop_strings is {list(stop_strings)}; wanted no empty text among them")
    prompts = [
        encode_prompt(
            tokenizer,
            prompt_turns(question, prompt_template, few_shot or {}),
            where=f"question {question.row} ({question.language})",
        )
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
            outcomes[index] = _judge(questions[index], golds[index], text, response, identifier)
        bar.update(len(rows))
    bar.close()
    return [outcomes[index] for index in range(len(questions))]


def default_stop_strings(
    tokenizer: Any,
    languages: Iterable[str],
    prompt_template: Templates = PLACE,
    few_shot: FewShot | None = None,
) -> tuple[str, ...]:
    """What ends an answer unless it is said otherwise: the beginning of another question or turn.

    None where the tokenizer has a chat template: there the end-of-turn token ends answers. Elsewhere a line that
    begins with the words before ``{question}`` in the template, with "Question:" in English or one of
    ``languages``, or with a turn of a common prompt format; the control tokens of chat formats; and, where every
    worked example answers in one line, the end of the line.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        return ()
    codes = dict.fromkeys(map(primary_code, ["en", *languages]))
    templates = [prompt_template] if isinstance(prompt_template, str) else prompt_template.values()
    before = [_around(template)[0] for template in templates]
    words = [ANSWER_WORDS[code] for code in codes if code in ANSWER_WORDS]
    starts = [
        *(start for start in before if start),
        *(word + colon for each in words for word in each.questions for colon in (":", " :", "：")),
        *TURNS,
    ]
    one_line = few_shot and not any("\n" in response for pairs in few_shot.values() for _, response in pairs)
    lines = ("\n",) if one_line else tuple(dict.fromkeys(f"\n{start}" for start in starts))
    return (*lines, *TURN_TOKENS)


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
    if ends := stopping_ids(getattr(model, "generation_config", None), end_of_turn(tokenizer)):
        extra["eos_token_id"] = ends
    elif not stop_strings:
        warn_once(NOTHING_ENDS_A_TURN)
    if stop_strings:
        extra["stopping_criteria"] = StoppingCriteriaList([_StopStrings(tokenizer, stop_strings, longest)])
    with contiguous_head(model), unshifted(model) if handle is None else nullcontext():
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
        longest = max(len(stop.encode()) for stop in stop_strings)
        self.tail = longest + 4  # tokens that can hold it: each is a byte at least

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = [
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :].tolist()
        ]
        ended = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def prompt_turns(question: Question, templates: Templates, few_shot: FewShot) -> list[Turn]:
    """The worked examples of the question's language, then the question in its template.

    Raises:
        ValueError: a template without ``{question}``, or for other languages only; no example in the language.
    """
    template = templates if isinstance(templates, str) else _of_language(templates, question.language)
    if template is None:
        raise ValueError(
            f"prompt_template has no entry for {question.language!r}; it has {', '.join(templates)}"
        )
    if PLACE not in template:
        raise ValueError(f"prompt_template is {template!r}; wanted a text with {PLACE} in it")
    examples = _of_language(few_shot, question.language)
    if few_shot and examples is None:
        raise ValueError(f"few_shot has no example in {question.language!r}; it has {', '.join(few_shot)}")
    before, after = _around(template)
    turns = []
    for example, response in examples or ():
        example, response = example.removeprefix(before).lstrip(), response.removeprefix(after).lstrip()
        turns += [Turn("user", template.replace(PLACE, example)), Turn("assistant", response)]
    return [*turns, Turn("user", template.replace(PLACE, question.text))]


def _of_language(values: Mapping[str, T], language: str) -> T | None:
    """The entry of a language, however its code is written there."""
    found = find_language(language, values)
    return None if found is None else values[found]


def _around(template: str) -> tuple[str, str]:
    """The words right before the question, and those right before the answer: ``Question:``, ``Answer:``."""
    before, _, after = template.partition(PLACE)
    return before.rpartition("\n")[2].strip(), after.rpartition("\n")[2].strip()


def _gold(question: Question) -> Gold:
    try:
        return read_gold(question.answer, question.language)
    except ValueError as error:
        raise ValueError(f"question {question.row} ({question.language}): {error}") from None


def _judge(question: Question, gold: Gold, prompt: str, response: str, identifier: AnswerLanguage) -> Outcome:
    correct, parsed = is_correct(response, gold, question.language)
    return Outcome(
        row=question.row,
        language=question.language,
        prompt=prompt,
        response=response,
        answer=gold.shown,
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
