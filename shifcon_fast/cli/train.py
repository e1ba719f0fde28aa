"""Training: one run, or the demo's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from shifcon_fast.cli import options
from shifcon_fast.extras import needed_for

with needed_for("the shifcon command"):
    import typer


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
    first. Ctrl-C or SIGTERM saves a checkpoint; --resume goes on from the last one. `--no-shift` and `--w-mcl 0`
    switch the two halves of the method off, which is the plain QLoRA to compare with.
    """
    from shifcon_fast.training.config import describe_fields, parse_config
    from shifcon_fast.workflow import train_run

    if help_all:
        for name, text, default in describe_fields():
            typer.echo(f"--{name.replace('_', '-')}  [{default}]\n    {' '.join(text.split())}")
        return
    run, arguments = parse_config(config, context.args)
    typer.echo(train_run.train(run, arguments))


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
