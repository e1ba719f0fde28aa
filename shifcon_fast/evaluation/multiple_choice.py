"""Multiple choice, by the log-likelihood of each choice as the continuation of the question.

As lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) does it, so that figures compare:

* log p(choice | question) = Σ of the log-probabilities of the choice's tokens, nats, float32 log-softmax;
* ``acc``: the choice of the greatest log-likelihood is right; ``acc_norm``: that of the greatest log-likelihood
  per character of the choice is (the delimiter before it is not counted). Of equal ones the first is taken;
* question and choice are tokenised as one text, see :func:`shifcon_fast.data.prompts.encode_continuation`.

The choices of a question share its tokens. These go through the model once, and the choices then through the cache:
with four short choices a third of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from shifcon_fast.data.languages import find_language, primary_code
from shifcon_fast.data.prompts import encode_continuation, prompt_text
from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.exact_match import FewShot, Templates, check_unique, prompt_turns
from shifcon_fast.evaluation.sentences import context_length, input_device
from shifcon_fast.modeling.attachment import unshifted
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.modeling.vocabulary import check_token_ids, embedding_rows, padding_id

_WITHOUT_SPACES = ("zh", "yue", "ja", "th", "lo", "km", "my", "bo", "dz")


@dataclass(frozen=True)
class ChoiceOutcome:
    """What became of one multiple-choice question.

    Attributes:
        row, language: which question; together unique. group: its kind.
        prompt: the text that the choices continue.
        gold: the place of the right choice.
        log_likelihoods: of every choice, nats.
    """

    row: int
    language: str
    group: str
    prompt: str
    choices: list[str]
    gold: int
    log_likelihoods: list[float]

    @property
    def chosen(self) -> int:
        """The place of the most likely choice."""
        return _argmax(self.log_likelihoods)

    @property
    def chosen_norm(self) -> int:
        """The place of the choice that is most likely per character."""
        return _argmax([a / len(b) for a, b in zip(self.log_likelihoods, self.choices, strict=True)])

    @property
    def correct(self) -> bool:
        """Whether the most likely choice is right (lm-eval's ``acc``)."""
        return self.chosen == self.gold

    @property
    def correct_norm(self) -> bool:
        """Whether the choice that is most likely per character is right (lm-eval's ``acc_norm``)."""
        return self.chosen_norm == self.gold


@torch.no_grad()
def measure_multiple_choice(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    handle: ShiftHandle | None = None,
    batch_size: int = 16,
    prompt_template: Templates = "{question}",
    few_shot: FewShot | None = None,
    delimiter: str | Mapping[str, str] | None = None,
    use_chat_template: bool = False,
    progress: bool = False,
) -> list[ChoiceOutcome]:
    """Score every choice of every question; outcomes in the order of the questions.

    Batches may mix languages; with a handle, each row is shifted by its own, question and choice alike.

    Args:
        questions: all with choices.
        handle: measure shifted with this attachment; None for an unshifted pass.
        batch_size: choices that are scored at once; a question's choices stay together.
        prompt_template: a text with ``{question}`` in it, for all languages or one for each.
        few_shot: language → worked (question, right choice) pairs, which come before the question, separated by an
            empty line.
        delimiter: what stands between question and choice; for all languages, or one for each. None takes a space
            (lm-eval's default), and nothing in languages that are written without spaces and after a chat template.
        use_chat_template: put the question as the user's turn and the choice as the assistant's.

    Raises:
        ValueError: a question without choices; a template without ``{question}``; a question and choice longer than
            the model's context; two questions with the same row and language; a chat template asked for where the
            tokenizer has none; log-likelihoods that are not finite.
    """
    check_unique(questions)
    encoded = [
        _encode(
            tokenizer,
            question,
            prompt_template=prompt_template,
            few_shot=few_shot or {},
            delimiter=delimiter,
            use_chat_template=use_chat_template,
        )
        for question in questions
    ]
    limit, rows = context_length(model), embedding_rows(model)
    for question, item in zip(questions, encoded, strict=True):
        where = f"question {question.row} ({question.language})"
        for tokens in (item.start, *item.endings):
            check_token_ids(tokens, tokenizer, rows, where)
        if limit is not None and item.length > limit:
            raise ValueError(
                f"{where} has {item.length} tokens with its longest choice; "
                f"the model's context holds {limit}: shorten it"
            )
    scores: dict[int, list[float]] = {}
    bar = tqdm(total=len(questions), desc="multiple choice", disable=not progress, leave=False)
    for batch in _batches(encoded, batch_size):
        languages = [questions[index].language for index in batch]
        with unshifted(model) if handle is None else nullcontext():
            found = _score(model, tokenizer, [encoded[index] for index in batch], languages, handle)
        scores |= zip(batch, found, strict=True)
        bar.update(len(batch))
    bar.close()
    return [
        _outcome(question, item.prompt, scores[index])
        for index, (question, item) in enumerate(zip(questions, encoded, strict=True))
    ]


@dataclass(frozen=True)
class _Encoded:
    """A question's tokens: those that all its choices begin with, and for each choice what follows.

    The last ``scored[i]`` tokens of ``endings[i]`` are choice i's own.
    """

    prompt: str
    start: list[int]
    endings: list[list[int]]
    scored: list[int]

    @property
    def length(self) -> int:
        return len(self.start) + max(map(len, self.endings))


def _encode(
    tokenizer: Any,
    question: Question,
    *,
    prompt_template: Templates,
    few_shot: FewShot,
    delimiter: str | Mapping[str, str] | None,
    use_chat_template: bool,
) -> _Encoded:
    if not question.choices:
        raise ValueError(
            f"question {question.row} ({question.language}) has no choices; wanted multiple choice (questions "
            "without choices are for answer_questions)"
        )
    between = _delimiter(delimiter, question.language, use_chat_template)
    turns = prompt_turns(question, prompt_template, few_shot)
    prompt = prompt_text(tokenizer, turns, delimiter=between, use_chat_template=use_chat_template)
    pairs = [encode_continuation(tokenizer, prompt, between + choice) for choice in question.choices]
    for choice, (_, own) in zip(question.choices, pairs, strict=True):
        if not own:
            raise ValueError(
                f"question {question.row} ({question.language}): the tokenizer makes no token of the choice "
                f"{choice!r}; wanted a text"
            )
    texts = [before + own for before, own in pairs]
    # The token before a choice stays with it: what the model says there is the choice's first log-probability.
    shared = min(min(len(before) for before, _ in pairs) - 1, _common_prefix(texts))
    return _Encoded(
        prompt, texts[0][:shared], [text[shared:] for text in texts], [len(own) for _, own in pairs]
    )


def _delimiter(given: str | Mapping[str, str] | None, language: str, after_template: bool) -> str:
    if isinstance(given, str):
        return given
    if given is not None:
        found = find_language(language, given)
        if found is None:
            raise ValueError(f"delimiter has no entry for {language!r}; it has {', '.join(given)}")
        return given[found]
    return "" if after_template or primary_code(language) in _WITHOUT_SPACES else " "


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    same = (len(set(column)) == 1 for column in zip(*texts, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), min(map(len, texts)))


def _batches(encoded: Sequence[_Encoded], batch_size: int) -> Iterator[list[int]]:
    """Questions of similar lengths, longest first, up to ``batch_size`` choices; those without a start apart."""
    batch: list[int] = []
    count = 0
    for index in sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].start), -encoded[i].length)):
        item = encoded[index]
        full = count + len(item.endings) > batch_size
        if batch and (full or bool(item.start) != bool(encoded[batch[0]].start)):
            yield batch
            batch, count = [], 0
        batch.append(index)
        count += len(item.endings)
    if batch:
        yield batch


def _score(
    model: Any,
    tokenizer: Any,
    batch: Sequence[_Encoded],
    languages: Sequence[str],
    handle: ShiftHandle | None,
) -> list[list[float]]:
    """Log-likelihoods of all choices of a batch's questions."""
    device = input_device(model)
    padding = padding_id(tokenizer, embedding_rows(model))
    questions = torch.tensor([row for row, item in enumerate(batch) for _ in item.endings], device=device)
    endings = [ending for item in batch for ending in item.endings]
    input_ids, mask = _padded(endings, padding, device, left=False)
    extra: dict[str, Any] = {"use_cache": False}
    ids = None if handle is None else handle.language_ids(list(languages)).to(device)
    if any(item.start for item in batch):
        # Padded on the left, so that every choice follows its question. Positions only count as distances (rotary,
        # ALiBi), so the padding may count as well.
        start_ids, start_mask = _padded([item.start for item in batch], padding, device, left=True)
        shift = {} if ids is None else {"language_ids": ids}
        # No logits; those of one position are slow on a CPU, see modeling/contiguous_head.py.
        nowhere = torch.empty(0, dtype=torch.long, device=device)
        cache = model(
            input_ids=start_ids, attention_mask=start_mask, use_cache=True, logits_to_keep=nowhere, **shift
        ).past_key_values
        cache.batch_select_indices(questions)
        mask = torch.cat([start_mask[questions], mask], dim=1)
        extra = {"past_key_values": cache, "use_cache": True}
    if ids is not None:
        extra["language_ids"] = ids[questions]
    logits = model(input_ids=input_ids, attention_mask=mask, **extra).logits
    scored = [count for item in batch for count in item.scored]
    found: list[float] = []
    for row, (ending, count) in enumerate(zip(endings, scored, strict=True)):
        # one choice at a time: the float32 copy of a batch's logits would be the largest tensor of all
        said = logits[row, len(ending) - count - 1 : len(ending) - 1].float()
        target = torch.tensor(ending[len(ending) - count :], device=said.device)
        found.append(-float(functional.cross_entropy(said, target, reduction="sum")))
    places = iter(found)
    return [[next(places) for _ in item.endings] for item in batch]


def _padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, T) int64."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
        ids[row, place] = torch.tensor(tokens, dtype=torch.long)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def _outcome(question: Question, prompt: str, log_likelihoods: list[float]) -> ChoiceOutcome:
    if not all(map(math.isfinite, log_likelihoods)):
        raise ValueError(
            f"question {question.row} ({question.language}) got the log-likelihoods {log_likelihoods}: the model's "
            "logits are not finite; use another dtype, or look at its weights"
        )
    return ChoiceOutcome(
        row=question.row,
        language=question.language,
        group=question.group,
        prompt=prompt,
        choices=list(question.choices),
        gold=question.gold,
        log_likelihoods=log_likelihoods,
    )


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
