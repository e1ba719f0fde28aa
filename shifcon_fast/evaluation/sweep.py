"""Try layer areas: with the shift on and no training, what becomes of text, retrieval and answers."""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from shifcon_fast.data.languages import find_language
from shifcon_fast.data.parallel import Parallel, read_parallel
from shifcon_fast.data.questions import Question, read_questions
from shifcon_fast.data.rows import Source
from shifcon_fast.evaluation.area_effects import EffectMeter
from shifcon_fast.evaluation.exact_match import check_installed
from shifcon_fast.evaluation.perplexity import Perplexity
from shifcon_fast.evaluation.retrieval import check_parallel
from shifcon_fast.modeling import fitting
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.evaluation_mode import evaluation_mode
from shifcon_fast.modeling.fingerprint import fingerprint_differences, model_fingerprint, quantization_of
from shifcon_fast.space.intervention import InterventionName, check_intervention
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import (
    FILE_NAME,
    AreaSweep,
    Candidate,
    ShiftedRetrieval,
    SweptArea,
)
from shifcon_fast.version import package_versions

log = logging.getLogger(__name__)


def sweep_area(
    model: nn.Module,
    tokenizer: Any,
    space: LanguageSpace,
    parallel: Parallel,
    questions: Source | Sequence[Question] | None = None,
    *,
    areas: Sequence[tuple[int, int]] | None = None,
    alpha: float | Sequence[float] = 1.0,
    intervention: InterventionName = "mean",
    grid: int | None = None,
    min_width: int | None = None,
    languages: Sequence[str] | None = None,
    sentences: int = 32,
    max_questions: int = 60,
    max_perplexity_rise: float = 0.1,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    output: str | Path | None = None,
    overwrite: bool = False,
    allow_missing: bool = False,
    progress: bool = True,
) -> AreaSweep:
    """Measure candidate layer areas with the shift on and no training: what ``recommend_area`` decides by.

    For every area: the perplexity of each language's own text against the unshifted model's, retrieval inside the
    area, and, where questions are given, the right answers. The pivot is not measured: its rows are left alone bit
    for bit. The result is also put on ``space.sweep``, where ``recommend_area`` and the trainer find it.

    Retrieval at boundaries f … b−1 does not depend on b, so it takes one pass for each f. Perplexity and answers
    take one for each area.

    Args:
        model: the model that the space was estimated on and that will be trained, not attached.
        parallel: as for :func:`shifcon_fast.data.parallel.read_parallel`; with all languages of the space, or those
            of ``languages``.
        questions: as for :func:`shifcon_fast.data.questions.read_questions`. Those with ``choices`` are scored by
            log-likelihood; others are answered by generation, which is slow.
        areas: pairs (forward, backward), 1 ≤ forward < backward ≤ L−1; None takes :func:`candidate_areas`.
        alpha: length of the shift, or several.
        intervention: another way to move hidden states than the mean shift (``space.intervention``); one that
            leaves the pivot's rows alone.
        grid, min_width: for :func:`candidate_areas`.
        languages: which to measure, the pivot always among them; None takes the space's.
        sentences: how many of each language, spaced evenly through the data; fewer where there are fewer.
        max_questions: how many of each language, in the same way.
        max_perplexity_rise: recorded for ``recommend_area``: the largest share by which an area may raise the
            perplexity of any language.
        output: folder for ``sweep.json``, which is replaced after every area; a sweep that is found there goes on,
            and areas that it lacks are added.
        overwrite: start over where ``output`` holds a sweep.
        allow_missing: drop rows of parallel text, and questions, that are missing in a language.

    Raises:
        ValueError: an attached model; a space of another model; areas out of range; data that cannot be read; a
            sweep in ``output`` of another model, space, data or settings.
    """
    if getattr(model, "shifcon", None) is not None:
        raise ValueError(
            "model: it is attached; call model.shifcon.detach() first, a sweep attaches it itself"
        )
    plan = _plan(areas, alpha, locate_decoder(model).num_boundaries, grid, min_width)
    if not (math.isfinite(max_perplexity_rise) and max_perplexity_rise >= 0):
        raise ValueError(f"max_perplexity_rise: got {max_perplexity_rise}; wanted a share, 0 or more")
    for name, value in (
        ("sentences", sentences),
        ("max_questions", max_questions),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name}: got {value}; wanted at least 1")
    check_intervention(intervention)
    if intervention == "centre":
        raise ValueError(
            "intervention: got 'centre', which moves the pivot too; a sweep measures the other languages against "
            "the pivot as it is: attach the model with it, and evaluate"
        )
    space.check_gives(intervention, (boundary for *area, _ in plan for boundary in area))
    text = _sentences(parallel, space, languages, sentences, allow_missing)
    asked = _questions(questions, list(text), max_questions, allow_missing)
    check_installed(asked)
    identity = {**_identity(model, space, text, asked, max_new_tokens), "intervention": intervention}
    others = [language for language in text if language != space.pivot]

    sweep = None if output is None or overwrite else _earlier(Path(output), identity)
    if sweep is None:
        sweep = AreaSweep(
            pivot=space.pivot,
            languages=others,
            num_boundaries=space.num_boundaries,
            max_perplexity_rise=max_perplexity_rise,
            identity=identity,
            planned=[],
            areas=[],
            versions=package_versions(),
        )
    sweep.max_perplexity_rise = max_perplexity_rise
    sweep.planned = sorted({*sweep.planned, *plan})
    meter = EffectMeter(
        model,
        tokenizer,
        space,
        text,
        asked,
        intervention=intervention,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    with evaluation_mode(model), torch.no_grad(), _without_dose_warnings():
        _measure(sweep, meter, output, progress)
    space.sweep = sweep
    return sweep


def candidate_areas(
    num_boundaries: int, *, grid: int | None = None, min_width: int | None = None
) -> list[tuple[int, int]]:
    """The areas to try: [f, b) between the multiples of ``grid``, the first inner boundary and the last.

    Args:
        num_boundaries: L, the number of blocks.
        grid: boundaries between candidates; None takes a sixth of L, which makes about 20 areas.
        min_width: the least boundaries of an area; None takes a sixth of L.

    Returns:
        Pairs (f, b), 1 ≤ f < b ≤ L−1, by f, then b.
    """
    sixth = math.ceil(num_boundaries / 6)
    step, width = grid if grid is not None else sixth, min_width if min_width is not None else sixth
    for name, value in (("grid", step), ("min_width", width)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; wanted at least 1")
    last = num_boundaries - 1
    ends = sorted({1, *range(step, last, step), last})
    found = [(f, b) for f in ends for b in ends if b - f >= width and f >= 1]
    if not found:
        raise ValueError(
            f"min_width: got {width}; a model of {num_boundaries} blocks has no inner area of that width"
        )
    return found


def _plan(
    areas: Sequence[tuple[int, int]] | None,
    alpha: float | Sequence[float],
    boundaries: int,
    grid: int | None,
    min_width: int | None,
) -> list[Candidate]:
    alphas = [float(alpha)] if isinstance(alpha, (int, float)) else [float(each) for each in alpha]
    if not alphas or any(not math.isfinite(each) or each == 0 for each in alphas):
        raise ValueError(f"alpha: got {alpha}; wanted one number or more, none of them 0")
    if areas is None:
        areas = candidate_areas(boundaries, grid=grid, min_width=min_width)
    elif grid is not None or min_width is not None:
        raise ValueError("grid, min_width: they choose areas, and areas were given; wanted one of the two")
    if not areas:
        raise ValueError("areas: got none; wanted pairs (forward, backward), or None for a grid")
    for forward, backward in areas:
        if not 1 <= forward < backward <= boundaries - 1:
            raise ValueError(
                f"areas: got {forward}:{backward}; wanted 1 <= forward < backward <= {boundaries - 1} "
                f"(the model has {boundaries} blocks)"
            )
    return [(forward, backward, each) for each in alphas for forward, backward in areas]


def _measure(sweep: AreaSweep, meter: EffectMeter, output: str | Path | None, progress: bool) -> None:
    """Fill in what the plan lacks, saving after each area."""
    waiting = sweep.missing
    before, start = sweep.seconds, time.monotonic()
    passes = len(sweep.languages)
    heads = {(f, each) for f, _, each in waiting if sweep.retrieval_at(f, each) is None}
    # smoothing=0: the time left goes by the mean over all passes so far, which short and long ones are part of.
    bar = tqdm(
        total=passes * ((0 if sweep.nll else 2) + len(heads) + len(waiting)) + meter.asks * len(waiting),
        desc="sweep",
        unit="pass",
        smoothing=0,
        disable=not progress or not waiting,
    )
    with bar:
        meter.step = bar.update
        if not sweep.nll:
            bar.set_description("unshifted")
            found = meter.perplexity(None)
            sweep.tokens = {language: each.tokens for language, each in found.items()}
            sweep.rows = meter.rows()
            sweep.right = meter.answers(None)
            sweep.retrieval = meter.retrieval(0)
            sweep.nll = {language: _nats(each) for language, each in found.items()}
        for done, (forward, backward, alpha) in enumerate(
            sorted(waiting, key=lambda each: (each[2], *each[:2]))
        ):
            bar.set_description(f"[{forward}, {backward}) area {done + 1}/{len(waiting)}")
            if sweep.retrieval_at(forward, alpha) is None:
                with meter.attached(forward, sweep.num_boundaries - 1, alpha) as handle:
                    scores = meter.retrieval(forward, handle)
                sweep.shifted_retrieval.append(ShiftedRetrieval(forward, alpha, scores))
            with meter.attached(forward, backward, alpha) as handle:
                nll = {language: _nats(each) for language, each in meter.perplexity(handle).items()}
                destroyed = [language for language, nats in nll.items() if None in nats]
                dose, right = meter.dose(handle), meter.answers(handle, destroyed)
                area = SweptArea(forward, backward, alpha, dose, nll, right)
            bisect.insort(sweep.areas, area, key=lambda each: each.candidate)
            sweep.seconds = before + time.monotonic() - start
            if output is not None:
                sweep.save(output)
    if output is not None:
        sweep.save(output)  # also where nothing was missing: the stated share may be another


def _sentences(
    parallel: Parallel,
    space: LanguageSpace,
    languages: Sequence[str] | None,
    count: int,
    allow_missing: bool,
) -> dict[str, list[str]]:
    """The sentences to measure on, the pivot's first."""
    named = space.languages if languages is None else languages
    own = [space.languages[space.language_id(language)] for language in named]  # as the space writes them
    wanted = list(dict.fromkeys([space.pivot, *own]))
    if len(wanted) < 2:
        raise ValueError(f"languages: got only the pivot, {space.pivot!r}; wanted another one to shift")
    text = read_parallel(parallel, languages=wanted, allow_missing=allow_missing)
    check_parallel(text, space.pivot)
    return {language: _spread(found, count) for language, found in text.items()}


def _questions(
    source: Source | Sequence[Question] | None, languages: Sequence[str], count: int, allow_missing: bool
) -> list[Question]:
    """The questions to ask, the same rows in every language."""
    if source is None:
        return []
    questions = read_questions(source, allow_missing=allow_missing)
    names = {each: find_language(each, languages) for each in {question.language for question in questions}}
    if left_out := sorted(each for each, name in names.items() if name is None):
        log.warning(
            "questions in %s are left out: the sweep measures %s", ", ".join(left_out), ", ".join(languages)
        )
    asked = [
        replace(question, language=name)
        for question in questions
        if (name := names[question.language]) is not None
    ]
    if not any(question.language != languages[0] for question in asked):
        raise ValueError(
            f"questions: none in {', '.join(languages[1:])}; wanted some in a language that is shifted"
        )
    rows = set(_spread(sorted({question.row for question in asked}), count))
    return sorted(
        (question for question in asked if question.row in rows),
        key=lambda question: (languages.index(question.language), question.row),
    )


@contextmanager
def _without_dose_warnings() -> Iterator[None]:
    """What ``attach`` says of a dose, a sweep has in its table."""
    before = fitting.logger.level
    fitting.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        fitting.logger.setLevel(before)


def _nats(found: Perplexity) -> list[float | None]:
    return [nats if math.isfinite(nats) else None for nats in found.nll]


def _spread(values: list[Any], count: int) -> list[Any]:
    """So many of the values, spaced evenly: neighbours are often of one document."""
    count = min(count, len(values))
    return [values[index * len(values) // count] for index in range(count)]


def _identity(
    model: nn.Module,
    space: LanguageSpace,
    text: Mapping[str, Sequence[str]],
    asked: Sequence[Question],
    max_new_tokens: int,
) -> dict[str, Any]:
    questions = [vars(question) for question in asked]
    return {
        "model": model_fingerprint(model),
        "vectors_sha256": space.vectors_sha256,
        "sentences": len(text[space.pivot]),
        "parallel_sha256": _sha256(text),
        "questions": len(questions),
        "questions_sha256": _sha256(questions) if questions else None,
        "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
        "quantization": quantization_of(model) or "none",
        "max_new_tokens": max_new_tokens if questions else None,
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, default=str).encode()).hexdigest()


def _earlier(folder: Path, identity: Mapping[str, Any]) -> AreaSweep | None:
    """The folder's sweep, to go on with; None if it has none.

    Raises:
        ValueError: it was made with something else.
    """
    if not (folder / FILE_NAME).is_file():
        return None
    sweep = AreaSweep.load(folder)
    there, here = {"intervention": "mean", **sweep.identity}, dict(identity)  # which older files do not say
    differences = fingerprint_differences(there.pop("model", {}), here.pop("model"))
    differences += [
        f"{name} {there.get(name)} there, {value} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{folder / FILE_NAME}: holds a sweep of another model, space, data or settings "
            f"({'; '.join(differences)}); choose another output, or start over with overwrite (--overwrite)"
        )
    return sweep
