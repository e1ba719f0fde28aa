"""One run of the experiment: an arm trained with a seed, and measured; and what all runs of a model share."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from arms import (
    BASE,
    FLORES_ROWS,
    LANGUAGES,
    LORA,
    PIVOT,
    SPACE_ROWS,
    TRANSLATION_ROWS,
    WEAK,
    arguments,
)
from peft import LoraConfig
from stored import questions, write_run
from transformers import AutoTokenizer

from shifcon_fast.data.cldr import cldr_instructions
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.evaluation.evaluate import evaluate
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.quantization import load_quantized
from shifcon_fast.training.trainer import ShifConTrainer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "real_models"

_TRANSLATE = {
    "en": "Translate into English", "de": "Translate into German", "fr": "Translate into French",
    "sw": "Translate into Swahili", "tr": "Translate into Turkish", "hi": "Translate into Hindi",
    "id": "Translate into Indonesian",
}  # fmt: skip


def prepare(model: str, *, data: Path, work: Path) -> Path:
    """The model's folder; its language spaces are estimated where they are not there yet."""
    sys.path.append(str(EXAMPLES))
    from fetch import fetch

    folder: Path = fetch(model, None)
    for recipe in ("stable", "official"):
        place = _space_folder(work, model, recipe)
        if (place / "language_space.json").is_file():
            continue
        loaded = load_quantized(folder, None, "nf4", dtype=torch.bfloat16)
        loaded.config._name_or_path = model  # the folder's place is this machine's
        text = _rows(data / "ntrex128.jsonl", SPACE_ROWS)
        space = estimate_space(loaded, AutoTokenizer.from_pretrained(folder), text, PIVOT, recipe=recipe)  # type: ignore[arg-type]
        space.save(place)
    return folder


def one_run(model: str, arm: str, seed: int, *, data: Path, work: Path, results: Path) -> None:
    """Train, measure, and write the result; nothing else is kept."""
    folder = prepare(model, data=data, work=work)
    from cldr_accuracy import processor  # of the examples too

    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = time.monotonic()
    known: dict[str, Any] = {"model": model, "arm": arm, "seed": seed, "processor": processor()}
    if arm == BASE:
        trained = load_quantized(folder, None, "nf4", dtype=torch.bfloat16)
    else:
        trained, found = train(model, arm, seed, folder=folder, tokenizer=tokenizer, data=data, work=work)
        known |= found
    known["training_seconds"] = round(time.monotonic() - start, 1)
    flores = _rows(data / "flores200_devtest.jsonl", FLORES_ROWS)
    if arm != BASE and not arguments(model, arm).get("shift", True):
        trained.shifcon.detach()  # it was there for the contrastive pass alone, if for anything
    result = evaluate(trained.eval(), tokenizer, flores, questions(), pivot=PIVOT, batch_size=32)
    write_run(results / model / f"{arm}-{seed}.json", result, known)


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
    loaded.get_base_model().config._name_or_path = model
    trainer = ShifConTrainer(
        loaded,
        args,
        processing_class=tokenizer,
        train_dataset=instructions(arm, data),
        parallel=_rows(data / "ntrex128.jsonl", TRANSLATION_ROWS),
        space=LanguageSpace.load(_space_folder(work, model, args.recipe)),
    )
    assert trainer.handle is not None
    dose = {code: [round(each, 4) for each in trainer.handle.shift.dose(code)] for code in WEAK}
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss_generation" in entry]
    return trainer.model, {"dose": dose, "log": steps}


def instructions(arm: str, data: Path) -> list[dict[str, str]]:
    """The facts of the train territories; for "translation" as many translation tasks besides."""
    facts = cldr_instructions(LANGUAGES, split="train")
    if arm != "translation":
        return facts
    text = _rows(data / "ntrex128.jsonl", TRANSLATION_ROWS)
    tasks = []
    for place in range(len(facts)):
        code, row = WEAK[place % len(WEAK)], place % len(TRANSLATION_ROWS)
        source, target = (code, PIVOT) if (place // len(WEAK)) % 2 else (PIVOT, code)
        prompt = f"{_TRANSLATE[target]}: {text[source][row]}"
        tasks.append({"lang": target, "prompt": prompt, "response": text[target][row]})
    return [row for pair in zip(facts, tasks, strict=True) for row in pair]


def _rows(path: Path, rows: range) -> dict[str, list[str]]:
    return {
        code: text[rows.start : rows.stop] for code, text in read_parallel(path, languages=LANGUAGES).items()
    }


def _space_folder(work: Path, model: str, recipe: str) -> Path:
    return work / "spaces" / f"{model}-{recipe}"
