"""What the ``shifcon`` commands do: each a function from files to a folder, which returns what to print."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import set_seed

from shifcon_fast.data.few_shot import read_few_shot, read_prompt_template
from shifcon_fast.data.instructions import read_instructions
from shifcon_fast.data.languages import find_language
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.data.prompts import encode_prompt
from shifcon_fast.data.questions import read_questions
from shifcon_fast.evaluation.comparison import FILE_NAME as COMPARISON
from shifcon_fast.evaluation.comparison import compare
from shifcon_fast.evaluation.evaluate import evaluate as measure
from shifcon_fast.evaluation.exact_match import check_installed
from shifcon_fast.evaluation.result import FILE_NAME, EvaluationResult
from shifcon_fast.evaluation.sweep import sweep_area
from shifcon_fast.evaluation.sweep_table import sweep_table
from shifcon_fast.export.targets import export_languages
from shifcon_fast.extras import MissingExtraError
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.modeling.vocabulary import check_token_ids, embedding_rows
from shifcon_fast.opening import is_run, load_tokenizer, open_model
from shifcon_fast.space import files as space_files
from shifcon_fast.space.area import Area, recommend_area
from shifcon_fast.space.language_shift import dose_warning
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.sweep_result import FILE_NAME as SWEEP_FILE
from shifcon_fast.space.sweep_result import AreaSweep
from shifcon_fast.storage import remove, replacing, retract, write_file, write_json
from shifcon_fast.tables import comparison_table, result_table, space_table
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.attaching import choose_area
from shifcon_fast.training.checkpoints import CARD, last_checkpoint, list_checkpoints
from shifcon_fast.training.config import RunConfig
from shifcon_fast.training.quantization import load_quantized
from shifcon_fast.training.run_folder import ADAPTER, FILES, PROFILE, read_card
from shifcon_fast.training.trainer import ShifConTrainer

AREA_FILE, DISTANCE_PLOT = "area.json", "distance.svg"
AGAINST = "against"
_BESIDE_EVALUATION = (COMPARISON, f"{AGAINST}/{FILE_NAME}")

logger = logging.getLogger(__name__)


def profile(
    model: str,
    parallel: str,
    output: Path,
    *,
    pivot: str = "en",
    languages: Sequence[str] | None = None,
    quantization: str = "nf4",
    batch_size: int = 16,
    rank: int | None = None,
    variance: float | None = None,
    max_length: int | None = None,
    allow_missing: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Estimate and save a language space, its recommended area (``area.json``) and a plot of the distances."""
    sentences = read_parallel(parallel, languages=languages, allow_missing=allow_missing)
    pivot = _pivot_of(pivot, sentences, parallel)
    loaded, tokenizer = open_model(model, quantization=quantization, trust_remote_code=trust_remote_code)
    space = estimate_space(
        loaded,
        tokenizer,
        sentences,
        pivot,
        batch_size,
        rank=rank,
        variance=variance,
        max_length=max_length,
    )
    left_over = _sweep_beside(space, output)
    area = recommend_area(space)
    plot, no_plot = _drawn(_distance_plot, space, area)
    with replacing(output, space_files.CARD, (space_files.TENSORS, AREA_FILE, DISTANCE_PLOT)) as staging:
        space.save(staging)
        write_json(staging / AREA_FILE, asdict(area))
        if plot is not None:
            (staging / DISTANCE_PLOT).write_bytes(plot)
    warning = dose_warning(space.shift(*area.span)) if area.span else None
    lines = [
        space_table(space, area),
        "",
        area.reason,
        *([f"warning: {warning}"] if warning else []),
        *left_over,
        *no_plot,
    ]
    return "\n".join([*lines, "", f"written to {output}"])


def _distance_plot(space: LanguageSpace, area: Area) -> bytes:
    from shifcon_fast.evaluation.plots import distance_plot

    return distance_plot(
        range(space.num_boundaries),
        area.distances,
        area.floor,
        area=area.span,
        split_distances=area.split_distances,
    )


def _sweep_plot(sweep: AreaSweep, alpha: float, area: Area) -> bytes:
    from shifcon_fast.evaluation.sweep_plot import sweep_plot

    return sweep_plot(sweep, alpha=alpha, chosen=area.span)


def _drawn(draw: Callable[..., bytes], *of: Any) -> tuple[bytes | None, list[str]]:
    """A picture; or None, and a line that says why there is none: what was measured is worth more than it."""
    try:
        return draw(*of), []
    except MissingExtraError as error:
        return None, [f"the picture is left out: {error}"]


def _sweep_beside(space: LanguageSpace, folder: Path) -> list[str]:
    """Take over the sweep that lies in a space's folder if it is of these vectors; else what to say of it."""
    if not (folder / SWEEP_FILE).is_file():
        return []
    advice = "sweep again with --overwrite, or delete it"
    try:
        found = AreaSweep.load(folder)
    except ValueError as error:
        return [f"{error}: {advice}"]
    if not found.is_of(space.vectors_sha256):
        return [f"{folder / SWEEP_FILE} is of an earlier language space: {advice}"]
    space.sweep = found
    return []


def _pivot_of(pivot: str, sentences: Mapping[str, Any], source: str) -> str:
    """The pivot as the data writes it."""
    found = find_language(pivot, sentences)
    if found is None:
        raise ValueError(
            f"pivot: got {pivot!r}; {source} has {', '.join(sentences)}; choose one of them with --pivot"
        )
    return found


def sweep(
    model: str,
    space: Path,
    parallel: str,
    *,
    questions: str | None = None,
    output: Path | None = None,
    quantization: str = "nf4",
    trust_remote_code: bool = False,
    **options: Any,
) -> str:
    """Try layer areas on a model; write ``sweep.json``, its heat maps and the area that it decides on.

    Args:
        output: None writes beside the language space, where ``train`` finds the sweep.
        options: of :func:`~shifcon_fast.evaluation.sweep.sweep_area`.
    """
    output = output if output is not None else space
    loaded_space = LanguageSpace.load(space)
    if is_run(model):
        raise ValueError(
            f"model: {model} is a run, trained for its own area; wanted the model before training"
        )
    loaded, tokenizer = open_model(model, quantization=quantization, trust_remote_code=trust_remote_code)
    found = sweep_area(loaded, tokenizer, loaded_space, parallel, questions, output=output, **options)
    areas = [recommend_area(loaded_space, alpha=alpha) for alpha in found.alphas]
    write_json(output / AREA_FILE, asdict(areas[0]))
    left_out: list[str] = []
    for alpha, area in zip(found.alphas, areas, strict=True):
        name = "sweep.svg" if len(areas) == 1 else f"sweep-alpha-{alpha:g}.svg"
        plot, left_out = _drawn(_sweep_plot, found, alpha, area)
        if plot is not None:
            write_file(output / name, plot)
    return "\n".join(
        [
            sweep_table(found),
            "",
            *(area.reason for area in areas),
            *left_out,
            "",
            f"{len(found.areas)} areas, measured in {found.seconds / 60:.1f} minutes; written to {output}",
            f"next: shifcon train --model {model} --space {output} ...{'' if areas[0].span else ' --no-shift'}"
            if output == space
            else f"`train --space {space}` does not see it: copy {SWEEP_FILE} there",
        ]
    )


def train(run: RunConfig, arguments: ShifConArguments) -> str:
    """Train a run into ``arguments.output_dir``; what can be refused is refused before the model loads."""
    output = Path(str(arguments.output_dir))
    resume = _where_to_start(run, output)
    parallel = read_parallel(run.parallel, languages=run.languages, allow_missing=run.allow_missing)
    instructions = read_instructions(run.instructions)
    _pivot_of(arguments.pivot, parallel, run.parallel)
    own = output / PROFILE  # where no space is given
    start_from = run.space or (own if resume and (own / space_files.CARD).is_file() else None)
    space = LanguageSpace.load(start_from) if start_from else None
    known = space.languages if space else tuple(parallel)
    spoken = dict.fromkeys(each.language for each in instructions)
    if unknown := [each for each in spoken if find_language(each, known) is None]:
        raise ValueError(
            f"instructions: {run.instructions} has {', '.join(map(repr, unknown))}, which the language space does "
            f"not know ({', '.join(known)}); profile with these languages or leave the rows out"
        )

    if space is not None and space.sweep is not None:
        choose_area(arguments, space)  # a sweep that speaks against the shift stops the run here

    tokenizer = load_tokenizer(run.model, run.trust_remote_code)
    targets = run.lora_target_modules
    set_seed(arguments.seed)  # the adapters are drawn when they are made, before the trainer seeds
    model = load_quantized(
        run.model,
        lora=LoraConfig(
            r=run.lora_r,
            lora_alpha=run.lora_alpha,
            lora_dropout=run.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        ),
        quantization=run.quantization,  # type: ignore[arg-type]
        trust_remote_code=run.trust_remote_code,
    )
    estimated = space is None
    if space is None:
        space = estimate_space(
            model,
            tokenizer,
            parallel,
            arguments.pivot,
            arguments.estimation_batch_size,
            max_length=arguments.max_length_other,
            recipe=arguments.recipe,  # type: ignore[arg-type]
        )
    trainer = ShifConTrainer(
        model,
        arguments,
        processing_class=tokenizer,
        train_dataset=instructions,
        parallel=parallel,
        space=space,
    )
    if run.overwrite:
        _clear(output)  # not before: what the new run was refused for must not cost the old one
    if estimated:
        space.save(own)
    result = trainer.train(resume_from_checkpoint=resume)
    return (
        f"{result.global_step} steps, training loss {result.training_loss:.4f}; the run is in {output}\n"
        f"next: shifcon evaluate --model {output} --against {run.model} --parallel DEV.jsonl --output RESULTS"
    )


def _where_to_start(run: RunConfig, output: Path) -> str | None:
    """The checkpoint to resume from, or None to start afresh in a folder that is free for it."""
    found = list_checkpoints(output) if output.is_dir() else []
    if run.resume and run.overwrite:
        raise ValueError("resume, overwrite: both given; wanted one of them")
    if run.resume:
        return str(last_checkpoint(output))
    taken = found or any((output / name).exists() for name in (CARD, *ADAPTER))
    if taken and not run.overwrite:
        raise ValueError(
            f"output: {output} holds a run already; --resume goes on from its last checkpoint, --overwrite "
            "starts over, or choose another folder"
        )
    return None


def _clear(output: Path) -> None:
    """Delete a run, its checkpoints and its evaluation; from the first step on nothing of it can be loaded."""
    retract(output, CARD, FILES)
    retract(output, FILE_NAME, _BESIDE_EVALUATION)
    retract(output / PROFILE, space_files.CARD, (space_files.TENSORS,))
    for checkpoint in list_checkpoints(output):
        remove(checkpoint, CARD)


def evaluate(
    model: str,
    output: Path,
    *,
    parallel: str | None = None,
    questions: str | None = None,
    against: str | None = None,
    languages: Sequence[str] | None = None,
    quantization: str | None = None,
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
        pivot = _pivot_of(pivot, text, parallel)
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
        "trust_remote_code": trust_remote_code,
        "base": base,
    }
    sources = {"parallel": parallel, "questions": questions}
    result = _measure(model, settings, options, sources)
    with replacing(output, FILE_NAME, _BESIDE_EVALUATION) as staging:
        result.save(staging)
    lines = [result_table(result)]
    if against is not None:
        boundary = next((found.matrix_boundary for found in result.retrieval.values()), None)
        other = other or _measure(against, {**settings, "matrix_boundary": boundary}, options, sources)
        comparison = compare(result, other)
        with replacing(output, FILE_NAME, _BESIDE_EVALUATION) as staging:
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


def generate(
    model: str,
    prompts: Sequence[str],
    *,
    language: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    quantization: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[str]:
    """Yield the answer to each prompt, shifted by ``language`` where the model is a run with a language space."""
    if not prompts:
        raise ValueError(
            "prompts: none given; wanted one or more, as arguments or a line each on standard input"
        )
    loaded, tokenizer = open_model(
        model, quantization=quantization, base=base, trust_remote_code=trust_remote_code
    )
    handle = getattr(loaded, "shifcon", None)
    if handle is None:
        raise ValueError(f"model: {model} has no language space to shift with; wanted the folder of a run")
    ids = handle.language_ids(language, device=loaded.device)
    settings = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for prompt in prompts:
        prompt_ids = encode_prompt(tokenizer, prompt)
        check_token_ids(prompt_ids, tokenizer, embedding_rows(loaded), f"prompt {prompt[:40]!r}")
        tokens = torch.tensor([prompt_ids], device=loaded.device)
        with torch.no_grad():
            answer = loaded.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                language_ids=ids,
                max_new_tokens=max_new_tokens,
                **settings,
            )
        yield tokenizer.decode(answer[0, tokens.shape[1] :], skip_special_tokens=True)


def export(
    run: str,
    target: str,
    output: Path,
    *,
    languages: Sequence[str] | None = None,
    without_shift: bool = False,
    gguf_model: Path | None = None,
    quantization: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write a run's languages for a place that does not run this package, each checked by loading it."""
    if not is_run(run):
        raise ValueError(f"run: {run} is no run; wanted the folder that `shifcon train` wrote")
    loaded, tokenizer = open_model(
        run, quantization=quantization, base=base, trust_remote_code=trust_remote_code
    )
    written = export_languages(
        loaded,
        target,
        output,
        tokenizer=tokenizer,
        languages=languages,
        without_shift=without_shift,
        gguf_model=gguf_model,
    )
    return "\n".join(f"{path}: {found or 'not checked'}" for path, found in written.items())


def report(folder: Path, output: Path | None = None) -> str:
    """Write the self-contained HTML page of a run, an evaluation or a profile; return where it is."""
    from shifcon_fast.evaluation.report import report_folder

    return str(report_folder(folder, output or folder / "report.html"))
