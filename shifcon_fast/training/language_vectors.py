"""The language vectors of a training run: how they follow the model, and their file in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.objective.vectors import LanguageVectors
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.storage import read_tensors
from shifcon_fast.training.arguments import ShifConArguments

VECTORS = "language_vectors.safetensors"  # of a checkpoint


def track_vectors(args: ShifConArguments, handle: ShiftHandle | None, model: Any) -> LanguageVectors | None:
    """The vectors at f and b, as ``args.vectors`` has them follow training."""
    if handle is None:
        return None
    dtype = model.get_input_embeddings().weight.dtype if args.running_dtype_of_model else torch.float64
    return LanguageVectors(
        handle.shift,
        args.vectors,  # type: ignore[arg-type]
        decay=args.ema_decay,
        unit=args.recipe == "official",
        running_sums=bool(args.running_sums),
        dtype=dtype,
    )


def load_vectors(checkpoint: Path, vectors: LanguageVectors) -> None:
    """Have ``vectors`` go on from a checkpoint's.

    Raises:
        ValueError: no such file, or not the vectors of such a run; the message names the file.
    """
    state = read_tensors(checkpoint / VECTORS)
    try:
        vectors.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{checkpoint / VECTORS}: {error}") from error


def estimate_again(
    model: Any,
    tokenizer: Any,
    parallel: Mapping[str, Sequence[str]],
    shift: LanguageShift,
    *,
    sentences: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> LanguageShift:
    """The shift as it is estimated on the model as it is now, which runs unshifted for it.

    Args:
        model, tokenizer: the model as training has changed it.
        parallel: aligned sentences in all languages of the shift.
        shift: what to estimate again.
        sentences: how many per language, spread evenly over the data; None: as many as ``shift`` is made from.
        batch_size, progress: as for ``estimate_space``.
    """
    available = len(parallel[shift.pivot])
    made_from = shift.provenance.get("sentences") or {"": available}
    count = min(available, sentences or max(made_from.values()))
    rows = [index * available // count for index in range(count)]
    space = estimate_space(
        model,
        tokenizer,
        {language: [parallel[language][row] for row in rows] for language in shift.languages},
        pivot=shift.pivot,
        batch_size=batch_size,
        boundaries=(shift.forward, shift.backward),
        subspaces=False,
        # Where nothing else is said, cut at the context: a long sentence must not end a run that is done.
        max_length=shift.provenance.get("max_length")
        or getattr(model.config, "max_position_embeddings", None),
        recipe=shift.recipe,
        progress=progress,
    )
    estimated = space.shift(shift.forward, shift.backward, shift.alpha, shift.recipe)
    # Router, directions and subspaces stay: they need the sentences themselves.
    return replace(
        shift,
        vectors=estimated.vectors,
        median_norm=estimated.median_norm,
        provenance=estimated.provenance,
    )
