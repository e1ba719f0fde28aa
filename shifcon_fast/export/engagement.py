"""The check that every export passes before its files count: loaded where it will be, it moves the logits.

Control and steering vectors have been silently ignored by servers. So the exported model is run beside the attached
one on a few tokens, and an export that does not bring the logits to where the shift brings them is an error, not a
file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS, _TOKENS = 2, 12


@dataclass(frozen=True)
class Engagement:
    """What the check found, in logits.

    Attributes:
        effect: the largest change that the shift makes; 0 for an export that leaves it out.
        error: the largest difference between the exported and the attached model.
    """

    effect: float
    error: float

    def __str__(self) -> str:
        off = f"the export is off by up to {self.error:.2g}"
        return f"the shift moves logits by up to {self.effect:.3g}; {off}" if self.effect else off


def probe_tokens(model: Any) -> Tensor:
    """(2, 12) token ids from all over the vocabulary, the same every time."""
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, rows, (_ROWS, _TOKENS), generator=generator)


@torch.no_grad()
def check_engagement(
    model: Any, language: str | None, exported: Callable[[Tensor], Tensor], what: str
) -> Engagement:
    """Run an export beside the attached model.

    Args:
        model: attached, if a language is given.
        language: which the export is for; None for an export that leaves the shift out.
        exported: (B, T) token ids → (B, T, vocabulary) logits of what was written, as it will be loaded.
        what: the export, for the error.

    Raises:
        ValueError: the export's logits are not the shifted ones: nearer to the unshifted than half the way.
    """
    tokens = probe_tokens(model)
    plain = attached_logits(model, tokens, None)
    wanted = attached_logits(model, tokens, language)
    got = exported(tokens).float().cpu()
    effect, error = float((wanted - plain).abs().max()), float((got - wanted).abs().max())
    scale = effect if language is not None else float(plain.abs().max())
    if not error < scale / 2:
        missed = float((got - plain).abs().max())
        state = "does not engage" if missed < error else "is not the attached model"
        raise ValueError(
            f"{what}: it {state} where it is loaded: its logits are off by {error:.3g}, where the whole shift is "
            f"{effect:.3g}. Nothing was kept; please report this with the output of `shifcon doctor`"
        )
    return Engagement(effect, error)


def check_displacement(
    model: Any, language: str, tokens: Tensor, *, plain: Tensor, shifted: Tensor, what: str
) -> Engagement:
    """For an export that leaves the weights to somebody else, quantised otherwise perhaps: compare the movement.

    Args:
        model: attached.
        language: which the export is for.
        tokens: (B, T) ids.
        plain, shifted: (B, T, vocabulary) logits of the other program without and with what was written.
        what: the export, for the error.

    Raises:
        ValueError: with the export the logits do not move as the shift moves them, to within half of it.
    """
    there = shifted - plain
    columns = min(there.shape[-1], model.get_output_embeddings().weight.shape[0])
    here = attached_logits(model, tokens, language) - attached_logits(model, tokens, None)
    there, here = there[..., :columns], here[..., :columns]
    effect, error = float(here.abs().max()), float((there - here).abs().max())
    if not float((there - here).norm()) < float(here.norm()) / 2:
        moved = float(there.abs().max())
        raise ValueError(
            f"{what}: it does not engage where it is loaded: it moves the logits by up to {moved:.3g}, and not "
            f"where the shift does, by up to {effect:.3g}. Nothing was kept; is the model there this run's?"
        )
    return Engagement(effect, error)


@torch.no_grad()
def attached_logits(model: Any, tokens: Tensor, language: str | None) -> Tensor:
    """(B, T, vocabulary) float32 on the CPU; unshifted for None, which a model that is not attached takes too."""
    inputs = {"input_ids": tokens.to(model.get_input_embeddings().weight.device)}
    handle = getattr(model, "shifcon", None)
    if handle is not None:
        rows = len(tokens)
        inputs["language_ids"] = (
            torch.full((rows,), -1) if language is None else handle.language_ids([language] * rows)
        )
    logits: Tensor = model(**inputs).logits
    return logits.float().cpu()
