"""The ``shifcon`` command: parses, calls, prints. What it calls is the package's public Python interface."""

from __future__ import annotations

import logging

from shifcon_fast.cli import measure, prepare, train, use
from shifcon_fast.cli.console import GuardedGroup
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
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command()(prepare.doctor)  # in the order of the help
app.command()(prepare.profile)
app.command()(prepare.sweep)
app.command(context_settings=_PASSED_ON)(train.train)
app.command()(measure.evaluate)
app.command()(use.generate)
app.command()(use.export)
app.command("lm-eval", context_settings=_PASSED_ON)(measure.lm_eval)
app.command()(use.card)
app.command()(measure.report)
app.command()(measure.compare)
app.command()(train.demo)


def main() -> None:
    """Entry point of the ``shifcon`` command."""
    # On CPUs with AVX512-BF16 bitsandbytes advises, at every start, to install a kernel that we keep switched off
    # (training/weights/quantization.py says why).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    app()
