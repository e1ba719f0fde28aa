"""The targets of ``shifcon export`` by name: one entry for each language in the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from shifcon_fast.export.control_vector import export_control_vector
from shifcon_fast.export.engagement import Engagement
from shifcon_fast.export.merged import export_merged
from shifcon_fast.export.peft_alone import export_peft
from shifcon_fast.export.shift_vectors import file_stem, shift_vectors, shifted_languages
from shifcon_fast.export.vllm import export_vllm

Target = Literal["peft", "merged", "gguf", "vllm"]
TARGETS: tuple[str, ...] = get_args(Target)
WITHOUT_SHIFT = "unshifted"


def export_languages(
    model: Any,
    target: str,
    output: Path,
    *,
    tokenizer: Any = None,
    languages: Sequence[str] | None = None,
    without_shift: bool = False,
    gguf_model: Path | None = None,
) -> dict[Path, Engagement | None]:
    """Export some languages of a run to one target.

    Args:
        model: as ``shifcon_fast.load`` returns it; left as it is.
        target: one of ``TARGETS``.
        output: holds one folder (peft, merged) or file (gguf, vllm) for each language, named after its code.
        tokenizer: saved into folders.
        languages: None takes all that are shifted, but for merged, which wants to be told.
        without_shift: for merged: leave the shift out, into the folder ``unshifted``.
        gguf_model: for gguf: the model to check the control vectors on.

    Returns:
        What was written → what its check found; None where nothing could be checked.

    Raises:
        ValueError: an unknown target, arguments that do not fit it, or what the exporters raise.
    """
    if target not in TARGETS:
        raise ValueError(f"to: got {target!r}; wanted one of {', '.join(TARGETS)}")
    if without_shift and (target != "merged" or languages):
        raise ValueError(
            "without_shift: wanted with --to merged and without --language: the other targets hold nothing but the "
            "shift, or are made for one language"
        )
    if gguf_model is not None and target != "gguf":
        raise ValueError(f"gguf_model: is for --to gguf, which it is checked on; got --to {target}")
    if without_shift:
        folder = output / WITHOUT_SHIFT
        return {folder: export_merged(model, None, folder, tokenizer=tokenizer)}
    if languages is None and target == "merged":
        raise ValueError(
            "language: wanted for --to merged, whose checkpoint speaks one language (--language sw), or "
            "--without-shift"
        )
    # All of them before the first is written: a misspelt code costs nothing.
    codes = [shift_vectors(model, code).language for code in languages or shifted_languages(model)]
    written: dict[Path, Engagement | None] = {}
    for code in dict.fromkeys(codes):
        if target == "peft":
            folder = output / file_stem(code)
            written[folder] = export_peft(model, code, folder, tokenizer=tokenizer)
        elif target == "merged":
            folder = output / file_stem(code)
            written[folder] = export_merged(model, code, folder, tokenizer=tokenizer)
        elif target == "gguf":
            found = export_control_vector(model, code, output, gguf_model=gguf_model)
            written[output / f"{file_stem(code)}.gguf"] = found
        else:
            written[output / f"{file_stem(code)}.pt"] = export_vllm(model, code, output)
    return written
