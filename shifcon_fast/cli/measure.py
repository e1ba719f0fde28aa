"""Measuring models and runs, and the pages of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from shifcon_fast.cli import options
from shifcon_fast.extras import needed_for

with needed_for("the shifcon command"):
    import typer


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


def lm_eval(context: typer.Context) -> None:
    """Measure a run with lm-evaluation-harness: its own command, which knows `--model shifcon` here.

        shifcon lm-eval --model_args pretrained=run/,language=sw --tasks mgsm_direct_sw

    Everything but --help is passed on; `lm_eval run --help` lists it. language= is that of the tasks; the pivot's
    gives the unshifted model. `--model` need not be said; `--model hf` measures other models, as ever.
    """
    from shifcon_fast.lm_eval_model import run_command

    run_command(context.args)


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, an evaluation or a profile.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="HTML file to write. Default: report.html in the folder.")
    ] = None,
) -> None:
    """Put what a folder holds (area, training curves, evaluation) into one self-contained HTML page."""
    from shifcon_fast.evaluation.report import report_folder

    typer.echo(report_folder(run, output))


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
