"""What one looks at before training: this machine, a model's language space, the shift by area."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from shifcon_fast.cli import options
from shifcon_fast.extras import needed_for

with needed_for("the shifcon command"):
    import typer


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
