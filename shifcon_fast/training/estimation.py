"""Estimating a language space again, on the model as training has changed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.space.language_space import LanguageSpace


def estimate_again(
    model: Any,
    tokenizer: Any,
    parallel: Mapping[str, Sequence[str]],
    space: LanguageSpace,
    *,
    recipe: Literal["stable", "official"],
    sentences: int | None = None,
    batch_size: int = 16,
    subspaces: bool = True,
    boundaries: Sequence[int] | None = None,
    progress: bool = True,
) -> LanguageSpace:
    """A new space with the languages and settings of ``space``.

    Args:
        model, tokenizer: the model as it is now; it runs unshifted.
        parallel: aligned sentences in all languages of the space.
        space: what to estimate again.
        recipe: of the vectors.
        sentences: how many per language, spread evenly over the data; None: as many as ``space`` is made from.
        batch_size, subspaces, boundaries, progress: as for ``estimate_space``.
    """
    available = len(parallel[space.pivot])
    count = min(available, sentences or max(space.counts.values()))
    rows = [index * available // count for index in range(count)]
    return estimate_space(
        model,
        tokenizer,
        {language: [parallel[language][row] for row in rows] for language in space.languages},
        pivot=space.pivot,
        batch_size=batch_size,
        boundaries=boundaries,
        subspaces=subspaces,
        rank=space.card.get("rank"),
        variance=space.card.get("variance"),
        # Where nothing else is said, cut at the context: a long sentence must not end a run that is done.
        max_length=space.card.get("max_length") or getattr(model.config, "max_position_embeddings", None),
        recipe=recipe,
        progress=progress,
    )
