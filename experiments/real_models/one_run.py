"""One run of the experiment: an arm trained with a seed, and measured; and what all runs of a model share."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import (
    ATTENTION,
    BASE,
    CHOICES,
    CONTINUED_ROWS,
    LORA,
    NEW_TOKENS,
    PIVOT,
    SENTENCES,
    WEAK,
    arguments,
    made_of,
    split_for,
)
from peft import LoraConfig
from stored import questions, result_file, write_run
from texts import digest, instructions, news, prompts, sentences, translations
from transformers import AutoTokenizer, TrainerCallback

from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.evaluate import area_of
from shifcon_fast.evaluation.exact_match import answer_questions
from shifcon_fast.evaluation.multiple_choice import measure_multiple_choice
from shifcon_fast.evaluation.perplexity import measure_perplexity
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.evaluation.retrieval import measure_retrieval
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.modeling.evaluation_mode import evaluation_mode
from shifcon_fast.space.language_shift import LanguageShift, Recipe
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.trainer import ShifConTrainer
from shifcon_fast.training.weights.quantization import load_quantized
from shifcon_fast.version import package_versions

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "real_models"


def prepare(model: str, *, data: Path, work: Path) -> Path:
    """The model's folder; its language spaces are estimated where they are not there yet."""
    sys.path.append(str(EXAMPLES))
    from fetch import fetch

    folder: Path = fetch(model, None)
    sentences_of_news = news(data)
    spaces: dict[str, tuple[Recipe, dict[str, list[str]]]] = {
        "stable": ("stable", sentences_of_news),
        "official": ("official", sentences_of_news),
        "questions": ("stable", prompts()),
    }
    for name, (recipe, text) in spaces.items():
        place = space_folder(work, model, name, data=data)
        if (place / "language_space.json").is_file():
            continue
        loaded = load_quantized(folder, None, "nf4", dtype=torch.bfloat16)
        loaded.config._name_or_path = model  # the folder's place is this machine's
        space = estimate_space(loaded, AutoTokenizer.from_pretrained(folder), text, PIVOT, recipe=recipe)
        space.save(place)
    return folder


def one_run(model: str, arm: str, seed: int, *, data: Path, work: Path, results: Path) -> None:
    """Train, measure, and write the result; nothing else is kept."""
    folder = prepare(model, data=data, work=work)
    from cldr_accuracy import processor  # of the examples too

    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = time.process_time()
    known: dict[str, Any] = {"model": model, "arm": arm, "seed": seed, "processor": processor()}
    known["text"] = digest(data)
    if arm == BASE:
        trained = load_quantized(folder, None, "nf4", dtype=torch.bfloat16)
        trained.set_attn_implementation(ATTENTION)
    else:
        trained, found = train(model, arm, seed, folder=folder, tokenizer=tokenizer, data=data, work=work)
        known |= found
    # Of the processor: runs go side by side.
    known["training_seconds"] = round(time.process_time() - start, 1)
    if arm != BASE and not arguments(model, arm).get("shift", True):
        trained.shifcon.detach()  # it was there for the contrastive pass alone, if for anything
    text = sentences(data)
    result = measure(trained, tokenizer, questions(split_for(seed)), text)
    known["continued"] = continued(trained, tokenizer, text)
    write_run(result_file(results, model, arm, seed), result, known)


def measure(
    model: Any, tokenizer: Any, asked: list[Question], text: dict[str, list[str]]
) -> EvaluationResult:
    """The model as it is used, in every mode that a result wants: without the shift it would take as long again."""
    handle = getattr(model, "shifcon", None)
    extra: dict[str, Any] = {"handle": handle, "batch_size": SENTENCES}
    boundaries = list(range(locate_decoder(model).num_boundaries))
    middle = len(boundaries) // 2
    with evaluation_mode(model):
        choices = measure_multiple_choice(model, tokenizer, asked, handle=handle, batch_size=CHOICES)
        perplexity = {
            code: measure_perplexity(model, tokenizer, rows, language=code, **extra)
            for code, rows in text.items()
        }
        retrieval = measure_retrieval(
            model, tokenizer, text, pivot=PIVOT, boundaries=boundaries, matrix_boundary=middle, **extra
        )
    modes = ("unshifted",) if handle is None else ("unshifted", "shifted")
    return EvaluationResult(
        model=model.config._name_or_path,
        pivot=PIVOT,
        area=None if handle is None else area_of(handle.shift),
        retrieval=dict.fromkeys(modes, retrieval),
        perplexity=dict.fromkeys(modes, perplexity),
        multiple_choice=dict.fromkeys(modes, choices),
        settings={"choices": CHOICES, "sentences": len(text[PIVOT])},
        versions=package_versions(),
    )


@torch.no_grad()
def continued(model: Any, tokenizer: Any, text: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
    """Language → what the model, as it is used, says after the first half of a sentence.

    ``in_language`` is whether that is in the sentence's language, None where it cannot be told.
    """
    begun = []
    for code, rows in text.items():
        for row in CONTINUED_ROWS:
            words = rows[row].split()
            first, rest = words[: len(words) // 2], words[len(words) // 2 :]
            begun.append(Question(row, code, " ".join(first), " ".join(rest)))
    handle = getattr(model, "shifcon", None)
    extra: dict[str, Any] = {"handle": handle, "batch_size": CHOICES, "stop_strings": ()}
    with evaluation_mode(model):
        outcomes = answer_questions(model, tokenizer, begun, max_new_tokens=NEW_TOKENS, **extra)
    return {
        code: [
            {"text": each.response, "in_language": each.in_language}
            for each in outcomes
            if each.language == code
        ]
        for code in text
    }


def train(
    model: str, arm: str, seed: int, *, folder: Path, tokenizer: Any, data: Path, work: Path
) -> tuple[Any, dict[str, Any]]:
    """(the trained model, what is good to know of its training)."""
    output = work / "runs" / f"{model}-{arm}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    args = ShifConArguments(
        output_dir=str(output),
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        use_cpu=not torch.cuda.is_available(),
        **arguments(model, arm),
    )
    torch.manual_seed(seed)
    loaded = load_quantized(
        folder, LoraConfig(**LORA), "nf4", dtype=torch.bfloat16, gradient_checkpointing=False
    )
    loaded.get_base_model().set_attn_implementation(ATTENTION)
    loaded.get_base_model().config._name_or_path = model
    trainer = ShifConTrainer(
        loaded,
        args,
        processing_class=tokenizer,
        train_dataset=instructions(arm, data),
        parallel=prompts() if made_of(arm).on_questions else translations(data),
        space=LanguageSpace.load(
            space_folder(work, model, "questions" if made_of(arm).on_questions else args.recipe, data=data)
        ),
    )
    handle = trainer.handle
    assert handle is not None
    at_the_end = _AtTheEnd(lambda: doses(handle.shift))
    trainer.add_callback(at_the_end)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss_generation" in entry]
    found = {"dose": doses(handle.shift), "dose_in_training": at_the_end.found, "log": steps}
    return trainer.model, found


class _AtTheEnd(TrainerCallback):
    """What is to be seen at the last step; vectors that follow training are estimated anew after it."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self.look = look
        self.found: Any = None

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.found = self.look()


def doses(shift: LanguageShift) -> dict[str, list[float]]:
    """Weak language → its dose at f and at b, in three digits that count."""
    return {code: [float(f"{each:.3g}") for each in shift.dose(code)] for code in WEAK}


def space_folder(work: Path, model: str, name: str, *, data: Path) -> Path:
    """Where one of the language spaces that :func:`prepare` estimates lies; other text has spaces of its own."""
    return work / "spaces" / digest(data)[:12] / f"{model}-{name}"
