"""``shifcon train``: from files to a run folder."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import set_seed

from shifcon_fast.data.instructions import read_instructions
from shifcon_fast.data.languages import find_language
from shifcon_fast.data.parallel import find_pivot, read_parallel
from shifcon_fast.data.translation_tasks import translation_instructions
from shifcon_fast.evaluation.result import FILE_NAME
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.opening import load_tokenizer
from shifcon_fast.space import space_folder
from shifcon_fast.space.intervention import MAPS, InterventionName
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.storage import remove, retract
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.attaching import choose_area
from shifcon_fast.training.config import RunConfig
from shifcon_fast.training.run.checkpoints import CARD, last_checkpoint, list_checkpoints
from shifcon_fast.training.run.run_card import ADAPTER, read_card
from shifcon_fast.training.run.run_folder import FILES, PROFILE
from shifcon_fast.training.trainer import ShifConTrainer
from shifcon_fast.training.weights.quantization import load_quantized, read_dtype
from shifcon_fast.workflow.evaluate_model import BESIDE_EVALUATION


def train(run: RunConfig, arguments: ShifConArguments) -> str:
    """Train a run into ``arguments.output_dir``; what can be refused is refused before the model loads."""
    output = Path(str(arguments.output_dir))
    dtype = read_dtype(run.dtype)
    resume = _where_to_start(run, output)
    if resume and dtype is None:
        dtype = getattr(torch, read_card(resume)["dtype"])
    parallel = read_parallel(run.parallel, languages=run.languages, allow_missing=run.allow_missing)
    instructions = read_instructions(run.instructions, arguments.language_column)
    find_pivot(arguments.pivot, parallel, run.parallel)
    if run.translation_instructions:
        instructions += translation_instructions(
            run.parallel if run.allow_missing else parallel,
            run.translation_instructions,
            pivot=arguments.pivot,
            languages=run.languages,
            directions=run.translation_directions,  # type: ignore[arg-type]
            temperature=run.translation_temperature,
            allow_missing=run.allow_missing,
            seed=arguments.seed,
        )
    own = output / PROFILE  # where no space is given
    start_from = run.space or (own if resume and (own / space_folder.CARD).is_file() else None)
    space = LanguageSpace.load(start_from) if start_from else None
    known = space.languages if space else tuple(parallel)
    spoken = dict.fromkeys(each.language for each in instructions)
    if unknown := [each for each in spoken if find_language(each, known) is None]:
        raise ValueError(
            f"instructions: {run.instructions} has {', '.join(map(repr, unknown))}, which the language space does "
            f"not know ({', '.join(known)}); profile with these languages or leave the rows out"
        )

    if space is not None:
        space.find_targets(arguments.targets or ())
        way: InterventionName = arguments.intervention or "mean"  # type: ignore[assignment]
        if space.sweep is not None or way in MAPS:
            area = choose_area(arguments, space)  # a sweep that speaks against the shift stops the run here
            space.check_gives(way, area)

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
        dtype=dtype,
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
    if trainer.is_world_process_zero():
        if run.overwrite:
            _clear(output)  # not before: what the new run was refused for must not cost the old one
        if estimated:
            space.save(own)
    trainer.accelerator.wait_for_everyone()
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
    retract(output, FILE_NAME, BESIDE_EVALUATION)
    retract(output / PROFILE, space_folder.CARD, (space_folder.TENSORS,))
    for checkpoint in list_checkpoints(output):
        remove(checkpoint, CARD)
