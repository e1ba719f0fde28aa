"""α as a parameter: a factor for each language, that training finds together with the adapters.

With a_l the factor of language l, rows of l are moved by α a_l times the displacement, at f and at b alike. a is
one parameter of both blocks, (K,) float32, that begins at 1 or where an earlier run has left it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from shifcon_fast.modeling.architectures import Decoder
from shifcon_fast.modeling.attachment import Attachment
from shifcon_fast.modeling.block_shift import FACTORS, SHIFT_TABLE, learn_factors
from shifcon_fast.modeling.installation import put_tables
from shifcon_fast.space.language_shift import LanguageShift


def learnt_alphas(decoder: Decoder, attachment: Attachment) -> nn.Parameter | None:
    """The parameter, (K,); None for a model that learns none."""
    shift = next(iter(attachment.shifts.values()))
    return decoder.blocks[shift.blocks[0]]._parameters.get(FACTORS)


def start_learning(decoder: Decoder, attachment: Attachment) -> nn.Parameter:
    """Make the factors of an attached model's only shift a parameter of it; the one that is there if it has one.

    Raises:
        ValueError: several shifts, or one of length 0.
    """
    if (known := learnt_alphas(decoder, attachment)) is not None:
        return known
    if len(attachment.shifts) > 1:
        raise ValueError(
            f"learn_alpha: the adapters {', '.join(map(repr, attachment.shifts))} have a shift each; wanted a "
            "model with one"
        )
    ((adapter, shift),) = attachment.shifts.items()
    if not shift.alpha:
        raise ValueError("learn_alpha: alpha is 0, with which nothing is shifted; wanted another, such as 1")
    first, second = (decoder.blocks[index] for index in shift.blocks)
    device = first._buffers[SHIFT_TABLE].device  # type: ignore[union-attr]
    begin = torch.ones(len(shift.languages)) if shift.alphas is None else shift.alphas
    parameter = nn.Parameter(begin.detach().to(device, torch.float32, copy=True))
    _use(decoder, attachment, adapter, replace(shift, alphas=None))
    learn_factors((first, second), parameter)
    return parameter


def stop_learning(decoder: Decoder, attachment: Attachment) -> None:
    """Have the shift keep what its parameter has learnt, which is none any more. Does nothing without one."""
    if (parameter := learnt_alphas(decoder, attachment)) is None:
        return
    ((adapter, shift),) = attachment.shifts.items()
    learn_factors((decoder.blocks[index] for index in shift.blocks), None)
    _use(decoder, attachment, adapter, as_learnt(shift, parameter))


def as_learnt(shift: LanguageShift, parameter: nn.Parameter | None) -> LanguageShift:
    """A shift with the factors as they are now; the shift itself where none are learnt."""
    if parameter is None:
        return shift
    return replace(shift, alphas=parameter.detach().float().cpu().clone())


def _use(decoder: Decoder, attachment: Attachment, adapter: str | None, shift: LanguageShift) -> None:
    attachment.shifts[adapter] = shift
    put_tables(decoder, attachment)
