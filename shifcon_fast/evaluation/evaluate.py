"""Measure a model on parallel text and on questions, in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from shifcon_fast.data.few_shot import PLACE
from shifcon_fast.data.languages import find_language
from shifcon_fast.data.parallel import Parallel, read_parallel
from shifcon_fast.data.questions import Question, read_questions
from shifcon_fast.data.rows import Source
from shifcon_fast.evaluation.exact_match import (
    FewShot,
    Templates,
    answer_questions,
    check_installed,
    default_stop_strings,
)
from shifcon_fast.evaluation.multiple_choice import measure_multiple_choice
from shifcon_fast.evaluation.perplexity import measure_perplexity
from shifcon_fast.evaluation.result import AttachedArea, EvaluationResult
from shifcon_fast.evaluation.retrieval import check_parallel, measure_retrieval
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.evaluation_mode import evaluation_mode
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.version import package_versions

log = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    parallel: Parallel | None = None,
    questions: Source | Sequence[Question] | None = None,
    *,
    handle: ShiftHandle | None = None,
    pivot: str | None = None,
    languages: Sequence[str] | None = None,
    boundaries: Sequence[int] | None = None,
    matrix_boundary: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    prompt_template: Templates = PLACE,
    few_shot: FewShot | None = None,
    stop_strings: Sequence[str] | None = None,
    choice_chat_template: bool = False,
    allow_missing: bool = False,
    memory_gib: float = 2.0,
    progress: bool = True,
) -> EvaluationResult:
    """Retrieval, MEXA and perplexity on parallel text; exact match, answer language and right choices on questions.

    An attached model is measured as it is used, shifted by each text's language; retrieval, perplexity and
    multiple choice also without the shift, for the "before". The model is in eval mode meanwhile, and afterwards
    in the mode it was in.

    Args:
        model: a causal language model of a known architecture, attached or not, 4-bit or not.
        parallel: as for :func:`shifcon_fast.data.parallel.read_parallel`.
        questions: as for :func:`shifcon_fast.data.questions.read_questions`.
        handle: the model's attachment; None takes the one found on the model (``model.shifcon``), if any.
        pivot: None takes that of the attachment's space, else ``"en"``.
        languages: which to measure, the pivot always among them; None takes all of the data.
        boundaries: where to measure retrieval and MEXA; None takes all.
        matrix_boundary: where to measure retrieval between all pairs of languages; None takes the middle of
            the shifted area, or of the decoder where nothing is attached.
        prompt_template, few_shot, stop_strings: see
        :func:`shifcon_fast.evaluation.exact_match.answer_questions`; the first two also hold for multiple choice.
        choice_chat_template: put multiple choice through the chat template. allow_missing: drop rows of parallel
        text in which a language is missing, and questions that are. memory_gib: memory for sentence
        representations, see :func:`measure_retrieval`.

    Raises:
        ValueError: neither parallel text nor questions; data that cannot be read (``DataError``); a language
            that the attachment's space does not know; a boundary out of range; a sentence or prompt longer
            than the context.
    """
    if parallel is None and questions is None:
        raise ValueError("parallel and questions are both None; wanted at least one to measure on")
    handle = handle if handle is not None else getattr(model, "shifcon", None)
    pivot = pivot or (handle.shift.pivot if handle is not None else "en")
    wanted = None
    if languages is not None:
        pivot = find_language(pivot, languages) or pivot
        wanted = list(dict.fromkeys([pivot, *languages]))
    text = (
        read_parallel(parallel, languages=wanted, allow_missing=allow_missing) if parallel is not None else {}
    )
    asked = (
        read_questions(questions, languages=languages, allow_missing=allow_missing)
        if questions is not None
        else []
    )
    check_installed(asked)
    if text:
        pivot = find_language(pivot, text) or pivot
        check_parallel(text, pivot)
        asked = [  # named as in the parallel text: one language is one line of the result
            replace(question, language=find_language(question.language, text) or question.language)
            for question in asked
        ]
    if handle is not None:
        for language in dict.fromkeys([*text, *(question.language for question in asked)]):
            handle.language_ids(language)  # an unknown language fails here, before hours of measuring

    count = locate_decoder(model).num_boundaries
    where = sorted(set(range(count) if boundaries is None else boundaries))
    if matrix_boundary is None:
        matrix_boundary = (handle.forward + handle.backward - 1) // 2 if handle is not None else count // 2
    for boundary in (*where, matrix_boundary):
        if not 0 <= boundary < count:
            raise ValueError(f"boundaries: got {boundary}; the model has 0 … {count - 1}")

    free = [question for question in asked if not question.choices]
    choice = [question for question in asked if question.choices]
    if stop_strings is None:
        spoken = dict.fromkeys(question.language for question in free)
        stop_strings = default_stop_strings(tokenizer, spoken, prompt_template, few_shot) if free else ()
    modes: dict[str, ShiftHandle | None] = {"unshifted": None}
    if handle is not None:
        modes["shifted"] = handle
    common: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    retrieval, perplexity = {}, {}
    with evaluation_mode(model):
        for mode, attached in modes.items() if text else ():
            log.info("retrieval and perplexity, %s", mode)
            retrieval[mode] = measure_retrieval(
                model,
                tokenizer,
                text,
                pivot=pivot,
                boundaries=where,
                matrix_boundary=matrix_boundary,
                handle=attached,
                memory_gib=memory_gib,
                **common,
            )
            perplexity[mode] = {
                code: measure_perplexity(model, tokenizer, texts, language=code, handle=attached, **common)
                for code, texts in text.items()
            }
        multiple_choice = {
            mode: measure_multiple_choice(
                model,
                tokenizer,
                choice,
                handle=attached,
                prompt_template=prompt_template,
                few_shot=few_shot,
                use_chat_template=choice_chat_template,
                **common,
            )
            for mode, attached in (modes.items() if choice else ())
        }
        outcomes = answer_questions(
            model,
            tokenizer,
            free,
            handle=handle,
            max_new_tokens=max_new_tokens,
            prompt_template=prompt_template,
            few_shot=few_shot,
            stop_strings=stop_strings,
            **common,
        )
    return EvaluationResult(
        model=str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__),
        pivot=pivot,
        area=None if handle is None else area_of(handle.shift),
        retrieval=retrieval,
        perplexity=perplexity,
        outcomes=outcomes,
        multiple_choice=multiple_choice,
        settings={
            "parallel": _source(parallel),
            "questions": _source(questions),
            "sentences": len(text[pivot]) if text else 0,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "prompt_template": prompt_template if isinstance(prompt_template, str) else dict(prompt_template),
            "few_shot": {code: len(examples) for code, examples in (few_shot or {}).items()},
            "stop_strings": list(stop_strings),
            "choice_chat_template": choice_chat_template,
            "decoding": "greedy",
        },
        versions=package_versions(),
    )


def area_of(shift: LanguageShift) -> AttachedArea:
    """Where, how far and how a shift moves, for the record of an evaluation."""
    area: AttachedArea = {
        "forward": shift.forward,
        "backward": shift.backward,
        "alpha": shift.alpha,
        "recipe": shift.recipe,
        "intervention": shift.intervention,
    }
    if alphas := shift.alphas_by_language:
        area["alphas"] = alphas
    return area


def _source(source: object) -> str | None:
    """What to call the data in the settings: its path or id, where it has one."""
    return None if source is None else str(source) if isinstance(source, (str, Path)) else "given in memory"
