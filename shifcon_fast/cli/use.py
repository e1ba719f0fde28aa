"""What one does with a run: answers, exports, its model card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from shifcon_fast.cli import options
from shifcon_fast.extras import needed_for

with needed_for("the shifcon command"):
    import typer


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
