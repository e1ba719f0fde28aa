"""The ``shifcon`` command: parses, calls, prints. What it calls is the package's public Python interface."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

from shifcon_fast import cli_options as options
from shifcon_fast.console import GuardedGroup
from shifcon_fast.extras import needed_for

with needed_for("the shifcon command"):
    import typer


app = typer.Typer(
    name="shifcon",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "ShifCon for any Hugging Face decoder: help a language model's weak languages by shifting their hidden "
        "states into the subspace of its dominant language and fine-tuning with a contrastive loss (4-bit QLoRA)."
        "\n\nThe way: `shifcon doctor`, then `profile` (language space, proposed layer area), `sweep` (what the "
        "shift does, by area), `train`, `evaluate` (with `--against` the model you had before), `report`. "
        "`shifcon demo` runs all of it on a generated world."
    ),
)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Predict a training step of this Hugging Face id or folder.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Instructions of a micro-batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of an instruction with its response.")] = 128,
    learnt: Annotated[float, typer.Option(help="Share of those tokens that is learnt (responses).")] = 0.5,
    contrastive_batch: Annotated[int, typer.Option(help="Translation pairs; 0 for none.")] = 8,
    length_pivot: Annotated[int, typer.Option(help="Tokens of a pivot sentence.")] = 48,
    length_other: Annotated[int, typer.Option(help="Tokens of its translation.")] = 96,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    quantization: options.Quantization = "nf4",
    dtype: options.Dtype = None,
    forward: Annotated[int | None, typer.Option(help="Boundary f. Default: a third of the blocks.")] = None,
    backward: Annotated[
        int | None, typer.Option(help="Boundary b. Default: two thirds of the blocks.")
    ] = None,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Say what this machine can do: versions, devices, NF4, dtype, and which backend each operator uses.

    Where an operator could be faster here, it says what is missing. Its output belongs into a bug report.

    With --model it predicts a training step of that model instead, from its config alone and from what a few blocks
    of it take on this machine: peak memory, and where the time goes.

        shifcon doctor --model org/model --batch 4 --length 512 --contrastive-batch 8
    """
    from shifcon_fast import doctor as examination

    if model is None:
        found = examination.examine()
        typer.echo(json.dumps(found, indent=2) if as_json else examination.describe(found))
        return
    plan = examination.plan(
        model,
        quantization=quantization,
        dtype=dtype,
        forward=forward,
        backward=backward,
        trust_remote_code=trust_remote_code,
        batch=batch,
        length=length,
        learnt=learnt,
        contrastive_batch=contrastive_batch,
        length_pivot=length_pivot,
        length_other=length_other,
        lora_r=lora_r,
    )
    typer.echo(json.dumps(plan.as_json(), indent=2) if as_json else examination.describe_plan(plan))


@app.command()
def profile(
    model: options.Model,
    parallel: options.Parallel,
    output: options.Output,
    pivot: Annotated[str, typer.Option(help="The dominant language.")] = "en",
    languages: options.Languages = None,
    quantization: options.Quantization = "nf4",
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = 16,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Directions of every language subspace. Default: 32, or what half the sentences allow.",
        ),
    ] = None,
    variance: Annotated[
        float | None,
        typer.Option(
            help="Instead of --rank: each subspace holds this share of the variance (the paper's way, 0.9); "
            "distances then grow with the rank."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Cut sentences to this many tokens. Default: refuse those beyond the context."
        ),
    ] = None,
    allow_missing: options.AllowMissing = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Estimate a model's language space and recommend the layer area to shift.

    Reads parallel sentences through the model (the one you will train, so 4-bit if you train it 4-bit), and
    writes the language vectors and subspaces, the subspace distance at every boundary with its noise floor,
    and a plot of it.

        shifcon profile --model org/model --parallel sentences.jsonl --output space/
    """
    from shifcon_fast.workflow import before_training

    result = before_training.profile(
        model,
        parallel,
        output,
        pivot=pivot,
        languages=options.split_codes(languages),
        quantization=quantization,
        dtype=dtype,
        batch_size=batch_size,
        rank=rank,
        variance=variance,
        max_length=max_length,
        allow_missing=allow_missing,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(result)


@app.command()
def sweep(
    model: options.Model,
    space: Annotated[Path, typer.Option("--space", help="Folder of `shifcon profile` on this model.")],
    parallel: options.Parallel,
    questions: options.Questions = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder to write to. Default: that of the space, where train looks."),
    ] = None,
    areas: Annotated[
        str | None,
        typer.Option("--areas", help="Areas to try, such as 4:12,8:20. Default: a grid of about 20."),
    ] = None,
    grid: Annotated[
        int | None,
        typer.Option(min=1, help="Boundaries between the areas' ends. Default: a sixth of the blocks."),
    ] = None,
    min_width: Annotated[
        int | None, typer.Option(min=1, help="Least boundaries of an area. Default: a sixth of the blocks.")
    ] = None,
    alpha: Annotated[
        str, typer.Option("--alpha", help="Length of the shift, or several, such as 0.5,1.")
    ] = "1",
    intervention: options.Intervention = "mean",
    sentences: Annotated[int, typer.Option(min=2, help="Sentences of each language.")] = 32,
    max_questions: Annotated[int, typer.Option(min=1, help="Questions of each language.")] = 60,
    max_perplexity_rise: Annotated[
        float,
        typer.Option(min=0.0, help="Share by which a recommended area may raise a language's perplexity."),
    ] = 0.1,
    languages: options.Languages = None,
    quantization: options.Quantization = "nf4",
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = 16,
    max_new_tokens: options.MaxNewTokens = 64,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over where a sweep is there.")
    ] = False,
    allow_missing: options.AllowMissing = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Try layer areas with the shift on and no training, and decide on one, or on none.

    For every area: perplexity of each language's own text, retrieval inside the area, and right answers where
    questions are given. Saved after each area; the same command goes on where it stopped. `train --space` goes
    by what it finds.

        shifcon sweep --model org/model --space space/ --parallel sentences.jsonl --questions dev.jsonl
    """
    from shifcon_fast.workflow import before_training

    typer.echo(
        before_training.sweep(
            model,
            space,
            parallel,
            questions=questions,
            output=output,
            areas=options.split_areas(areas),
            grid=grid,
            min_width=min_width,
            alpha=options.split_numbers("--alpha", alpha),
            intervention=intervention,
            sentences=sentences,
            max_questions=max_questions,
            max_perplexity_rise=max_perplexity_rise,
            languages=options.split_codes(languages),
            quantization=quantization,
            dtype=dtype,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            overwrite=overwrite,
            allow_missing=allow_missing,
            trust_remote_code=trust_remote_code,
        )
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of fields; flags override it.")
    ] = None,
    help_all: Annotated[
        bool, typer.Option("--help-all", help="List every field that --config and flags can set.")
    ] = False,
) -> None:
    """Fine-tune with QLoRA and the ShifCon objective.

    Every field is a flag and a line of the YAML file, under the same name:

        shifcon train --model org/model --space space/ --parallel sentences.jsonl \\
            --instructions instructions.jsonl --output run/ --max-steps 500

    or `shifcon train --config run.yaml --learning-rate 1e-4`. Without --space the language space is estimated
    first. Ctrl-C saves a checkpoint; --resume goes on from the last one. `--no-shift` and `--w-mcl 0` switch the
    two halves of the method off, which is the plain QLoRA to compare with.
    """
    from shifcon_fast.training.config import describe_fields, parse_config
    from shifcon_fast.workflow import train_run

    if help_all:
        for name, text, default in describe_fields():
            typer.echo(f"--{name.replace('_', '-')}  [{default}]\n    {' '.join(text.split())}")
        return
    run, arguments = parse_config(config, context.args)
    typer.echo(train_run.train(run, arguments))


@app.command()
def evaluate(
    model: options.Model,
    output: options.Output,
    parallel: Annotated[
        str | None,
        typer.Option("--parallel", help="Held-out parallel sentences: retrieval, MEXA, perplexity."),
    ] = None,
    questions: options.Questions = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="A second model or run (or its evaluation folder) to compare with."),
    ] = None,
    pivot: Annotated[
        str | None, typer.Option("--pivot", help="The dominant language. Default: the run's, or en.")
    ] = None,
    languages: options.Languages = None,
    base: options.Base = None,
    quantization: options.QuantizationOfModel = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = 16,
    max_new_tokens: options.MaxNewTokens = 256,
    prompt_template: Annotated[
        str,
        typer.Option(
            help=r"Text with {question} in it, \n for a new line; or a YAML or JSON file of language: template."
        ),
    ] = "{question}",
    few_shot: Annotated[
        Path | None,
        typer.Option(
            help='Worked examples: {"en": {"question": "...", "response": "..."}, "sw": ...} a line, or "lang", '
            '"prompt" and "response". They go through the template.'
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help=r"Text that ends an answer, \n for a new line; may be repeated; one empty text: none. Default: "
            "what begins a new question or turn, and none where the tokenizer has a chat template."
        ),
    ] = None,
    choice_chat_template: Annotated[
        bool, typer.Option(help="Score the choices of a question after the chat template, as an answer.")
    ] = False,
    allow_missing: options.AllowMissing = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Measure, by language: retrieval and MEXA at every boundary, perplexity, answers and their language, choices.

        shifcon evaluate --model run/ --parallel dev.jsonl --questions mgsm.jsonl \\
            --against org/model --output results/

    With --against, differences come with intervals from a paired bootstrap over the same items.
    """
    from shifcon_fast.workflow import evaluate_model

    typer.echo(
        evaluate_model.evaluate(
            model,
            output,
            parallel=parallel,
            questions=questions,
            against=against,
            pivot=pivot,
            languages=options.split_codes(languages),
            base=base,
            quantization=quantization,
            dtype=dtype,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            prompt_template=options.template_text(prompt_template),
            few_shot=few_shot,
            stop_strings=None if stop is None else [options.with_new_lines(text) for text in stop if text],
            choice_chat_template=choice_chat_template,
            allow_missing=allow_missing,
            trust_remote_code=trust_remote_code,
        )
    )


@app.command()
def generate(
    model: options.Model,
    language: Annotated[str, typer.Option("--language", help="Language of the prompts: its code, or auto.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts. Without any, one prompt a line is read from standard input."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    quantization: options.QuantizationOfModel = None,
    dtype: options.Dtype = None,
    base: options.Base = None,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Answer prompts with a trained run, shifted by their language.

    shifcon generate --model run/ --language sw "Mji mkuu wa Kenya ni upi?"
    """
    from shifcon_fast.workflow import use_run

    lines = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for answer in use_run.generate(
        model,
        lines,
        language=language,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        quantization=quantization,
        dtype=dtype,
        base=base,
        trust_remote_code=trust_remote_code,
    ):
        typer.echo(answer)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    to: Annotated[
        str, typer.Option("--to", help="peft (adapter), merged (checkpoint), gguf (control vector) or vllm.")
    ],
    output: options.Output,
    language: Annotated[
        str | None,
        typer.Option("--language", help="Codes, such as sw or sw,bn. Default: all that the run shifts."),
    ] = None,
    without_shift: Annotated[
        bool, typer.Option("--without-shift", help="merged: the adapter alone, for gguf and vllm.")
    ] = False,
    gguf_model: Annotated[
        Path | None,
        typer.Option("--gguf-model", help="gguf: the model to check the control vector on, in llama.cpp."),
    ] = None,
    quantization: options.QuantizationOfModel = None,
    dtype: options.Dtype = None,
    base: options.Base = None,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Write a run for places that do not run this package: PEFT, transformers, llama.cpp, vLLM.

        shifcon export run/ --to peft --language sw --output adapters/

    Each language is a folder or a file named after its code. What is written is loaded again and must move the
    logits as the shift does.
    """
    from shifcon_fast.workflow import use_run

    typer.echo(
        use_run.export(
            run,
            to,
            output,
            languages=options.split_codes(language),
            without_shift=without_shift,
            gguf_model=gguf_model,
            quantization=quantization,
            dtype=dtype,
            base=base,
            trust_remote_code=trust_remote_code,
        )
    )


@app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(context: typer.Context) -> None:
    """Measure a run with lm-evaluation-harness: its own command, which knows `--model shifcon` here.

        shifcon lm-eval --model_args pretrained=run/,language=sw --tasks mgsm_direct_sw

    Everything but --help is passed on; `lm_eval run --help` lists it. language= is that of the tasks; the pivot's
    gives the unshifted model. `--model` need not be said; `--model hf` measures other models, as ever.
    """
    from shifcon_fast.lm_eval_model import run_command

    run_command(context.args)


@app.command()
def card(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", help="Folder of `shifcon evaluate` on it, for the tables.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", help="Hub id of the base model, where the run was trained from a folder."
        ),
    ] = None,
    repository: Annotated[
        str | None, typer.Option("--repository", help="Hub id that the run will have.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="As the Hub writes it: apache-2.0.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Hub id of training data; may be repeated.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A further tag; may be repeated.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also over a card that a person has written.")
    ] = False,
) -> None:
    """Write a run's model card: README.md with the Hub's metadata.

        shifcon card run/ --evaluation results/ --repository you/model-sw

    Languages, area, dose, losses, the evaluation, and how to load the run everywhere it can be. Training writes one
    too; this adds what a run does not know of itself. No path of this machine is in it.
    """
    from shifcon_fast.workflow.describe_run import describe

    typer.echo(
        describe(
            run,
            evaluation=evaluation,
            base_model=base_model,
            repository=repository,
            license=license,
            datasets=dataset or (),
            tags=tag or (),
            overwrite=overwrite,
        )
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, an evaluation or a profile.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="HTML file to write. Default: report.html in the folder.")
    ] = None,
) -> None:
    """Put what a folder holds (area, training curves, evaluation) into one self-contained HTML page."""
    from shifcon_fast.evaluation.report import report_folder

    typer.echo(report_folder(run, output))


@app.command()
def compare(
    evaluations: Annotated[
        list[str],
        typer.Argument(
            help="Folders of `shifcon evaluate` on the same questions, as NAME=FOLDER or FOLDER. The same NAME "
            "again is another seed of that system."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for report.html and systems.json.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="What the others are measured against. Default: the first."),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option("--before", help="The untrained one: shown, not measured against the baseline."),
    ] = None,
) -> None:
    """Put any number of systems side by side on one page, with intervals over seeds and questions.

    shifcon compare plain=plain-1 plain=plain-2 ours=shifcon-1 ours=shifcon-2 --output compared/
    """
    from shifcon_fast.workflow.compare_runs import compare_runs

    typer.echo(compare_runs(evaluations, output, baseline=baseline, before=before))


@app.command()
def demo(
    output: options.Output = Path("demo-output"),
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds a system.")] = 3,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time, one thread each. Default: one a core.")
    ] = None,
) -> None:
    """Run the whole method on a generated multilingual world, without a download, and write a report.

    Trains a tiny Llama (cached after the first time), then plain QLoRA and ShifCon QLoRA from it, and compares
    them by language with intervals. The trainings run side by side, one thread each.
    """
    from shifcon_fast.demo.run import run_demo

    typer.echo(run_demo(output, seeds=seeds, jobs=jobs))


def main() -> None:
    """Entry point of the ``shifcon`` command."""
    # On CPUs with AVX512-BF16 bitsandbytes advises, at every start, to install a kernel that we keep switched off
    # (training/quantization.py says why).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    app()


if __name__ == "__main__":
    main()
