"""Attach language shifts to a live Hugging Face model, and take them off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from shifcon_fast.modeling.adapters import adapted_module
from shifcon_fast.modeling.architectures import Decoder, locate_decoder
from shifcon_fast.modeling.attachment import ATTACHMENT, Attachment
from shifcon_fast.modeling.fitting import check_fits, check_size
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.modeling.installation import install, outermost_model, uninstall
from shifcon_fast.space.intervention import InterventionName
from shifcon_fast.space.language_shift import LanguageShift, Recipe
from shifcon_fast.space.language_space import LanguageSpace


def attach(
    model: nn.Module,
    space: LanguageSpace | LanguageShift,
    forward: int | None = None,
    backward: int | None = None,
    alpha: float | Mapping[str, float] | None = None,
    *,
    recipe: Recipe | None = None,
    intervention: InterventionName | None = None,
    targets: Sequence[str] = (),
    seed: int = 0,
    adapter: str | None = None,
    check_fingerprint: bool = True,
) -> ShiftHandle:
    """Make a model shift rows of other languages into the pivot's region between two boundaries.

    At boundary ``forward``, h ← h + α (v(pivot) - v(language)); at boundary ``backward``, the same with the sign
    turned round (ShifCon, arXiv 2410.19453). Which language a row is in is said, from the strongest:

    * by ``language_ids``, which the model's forward and ``generate`` then take: a (B,) integer tensor from
      :meth:`ShiftHandle.language_ids`, or (B, T), one id per token; ids of -1 are left alone;
    * by ``with handle.use("sw"):``, for calls of this thread;
    * by ``handle.language = "sw"``, for all calls.

    Rows of the pivot are left alone bit for bit. Without any of these nothing is shifted, which is warned of once
    per model unless it happens under :meth:`ShiftHandle.suspended` or alpha is 0.

    Only this instance changes, and :meth:`ShiftHandle.detach` puts everything back. Weights, ``state_dict`` and
    ``save_pretrained`` are untouched. Attach before or after PEFT wraps the model. An attached model can be copied,
    pickled, and run by several threads; it is freed with the last reference to it and to its handle.

    Args:
        model: a causal LM, a PEFT model around one, or a bare decoder.
        space: the language vectors, estimated on this model; or the shift that is made of them.
        forward, backward: boundaries f < b, each in 0 … L-1 (1 … L-1 for ``recipe="official"``).
        alpha: length of the shift, in language vector differences; finite. None is 1. Or one for each language,
            ``{"sw": 0.5}``; others have 1.
        recipe: ``"stable"`` adds the vectors of boundary k at boundary k. ``"official"`` adds those of boundaries
            f and b at f-1 and b-1, as the authors' code does. None is ``"stable"``.
        intervention: another way to move hidden states than by the mean shift, which None is: a map between
            subspaces, or a control; see :mod:`shifcon_fast.space.intervention`. Some move the pivot's rows too.
        targets, seed: of the intervention, see :meth:`.LanguageSpace.shift`.
        adapter: shift only while this PEFT adapter is the active one; None shifts whatever the adapter.
        check_fingerprint: refuse a space that was estimated on another model.

    Returns:
        The handle, also found as ``shifcon`` on the Hugging Face model.

    Raises:
        ValueError: no decoder in the model; boundaries out of order or range; an alpha that is not finite; a space
            of another hidden size, number of boundaries or model; a model that is attached already. The model is
            then as it was.
        TypeError: a space without an area, or a shift, which has one, with another.
    """
    decoder = locate_decoder(model)
    if ATTACHMENT in decoder.module.__dict__:
        raise ValueError(
            "model: it is attached already; call model.shifcon.detach() first, or model.shifcon.add_shift(...) for "
            "a further adapter's."
        )
    options = {"intervention": intervention, "targets": targets, "seed": seed}
    shift = _shift(space, decoder, options, forward=forward, backward=backward, alpha=alpha, recipe=recipe)
    check_fits(shift, model, decoder, check_fingerprint)
    outer = outermost_model(model, decoder.module)
    attachment = Attachment(
        {adapter: shift},
        decoder.architecture.forwards_kwargs,
        ShiftHandle,
        adapted=None if adapter is None else adapted_module(decoder.module, adapter),
    )
    try:
        install(decoder, outer, attachment)
    except BaseException:
        uninstall(decoder, outer)
        raise
    handle: ShiftHandle = attachment.handle_of(outer)
    return handle


def _shift(
    space: LanguageSpace | LanguageShift,
    decoder: Decoder,
    options: Mapping[str, Any],
    *,
    forward: int | None,
    backward: int | None,
    alpha: float | Mapping[str, float] | None,
    recipe: Recipe | None,
) -> LanguageShift:
    given = {name: value for name, value in options.items() if value}
    if isinstance(space, LanguageShift):
        if given or (forward, backward, alpha, recipe) != (None, None, None, None):
            raise TypeError(
                "forward, backward, alpha, recipe, intervention, targets, seed: got one with a LanguageShift, "
                "which has them; dataclasses.replace(shift, alpha=...) changes them"
            )
        return space
    if forward is None or backward is None:
        raise TypeError(
            f"forward, backward: got {forward} and {backward}; wanted two boundaries, for instance those of "
            "recommend_area(space)"
        )
    check_size(space, decoder)
    return space.shift(forward, backward, 1.0 if alpha is None else alpha, recipe or "stable", **given)
