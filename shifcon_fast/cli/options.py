"""Options that several commands of ``shifcon`` share, and how the lists that some of them take are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from shifcon_fast.extras import needed_for

with needed_for("the shifcon command"):
    import typer

Model = Annotated[str, typer.Option("--model", help="Hugging Face id, model folder, or the folder of a run.")]
Output = Annotated[Path, typer.Option("--output", help="Folder to write to; made if it is not there.")]
Parallel = Annotated[
    str,
    typer.Option(
        "--parallel",
        help='Parallel sentences: {"en": "...", "sw": "..."} a row, as JSON Lines, JSON, CSV, TSV or Parquet, or a '
        "dataset id.",
    ),
]
Quantization = Annotated[
    str, typer.Option("--quantization", help="nf4: 4-bit base weights (bitsandbytes). none: as saved.")
]
Intervention = Annotated[
    str,
    typer.Option(
        "--intervention",
        help="How hidden states are moved: mean (ShifCon's shift), random (its control), subspace, affine, "
        "procrustes.",
    ),
]
QuantizationOfModel = Annotated[
    str | None,
    typer.Option(
        "--quantization", help="nf4 or none. Default: as a run was trained; nf4 for models that are no run."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16. Default: as a run was trained; else bfloat16 on CUDA, and on a CPU "
        "what it is faster in.",
    ),
]
Languages = Annotated[
    str | None,
    typer.Option(
        "--languages",
        help="Comma-separated codes to use, such as en,sw,bn, in any form (swh_Latn, pt-BR). Default: all.",
    ),
]
AllowMissing = Annotated[
    bool,
    typer.Option("--allow-missing", help="Drop rows in which a language is missing (null, NaN or blank)."),
]
RemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model. Off unless you trust it."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Base model of the run, if it is no longer where it was trained from."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sentences a batch.")]
Questions = Annotated[
    str | None,
    typer.Option(
        "--questions",
        help='Questions: {"answer": 18, "en": "...", "sw": "..."} a row; with "choices" scored, else answered '
        "(slow).",
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=1, help="Longest answer to an open question or a prompt, in tokens."
    ),
]


def split_codes(codes: str | None) -> list[str] | None:
    """``en,sw`` or ``en sw`` as a list."""
    return codes.replace(",", " ").split() or None if codes else None


def with_new_lines(text: str) -> str:
    """``\\n`` as it can be typed in a shell."""
    return text.replace("\\n", "\n")


def template_text(template: str) -> str:
    """A template as it can be typed in a shell; the name of a file is left as it is."""
    return with_new_lines(template) if "{question}" in template else template


def split_numbers(flag: str, text: str) -> list[float]:
    """``0.5,1`` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag}: got {text!r}; wanted numbers, such as 0.5,1") from None


def split_areas(text: str | None) -> list[tuple[int, int]] | None:
    """``4:12,8:20`` as pairs."""
    if text is None:
        return None
    try:
        return [
            (int(forward), int(backward)) for forward, backward in (a.split(":") for a in text.split(","))
        ]
    except ValueError:
        raise ValueError(f"--areas: got {text!r}; wanted pairs forward:backward, such as 4:12,8:20") from None
