"""The attachment that a training run works with: made if need be, and the same when the run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shifcon_fast.data.languages import is_same_language
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.notices import warn_once
from shifcon_fast.space.area import propose_area, recommend_area
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.run.checkpoints import CARD, read_trainer_state
from shifcon_fast.training.run.run_card import read_card
from shifcon_fast.training.weights.adapter_files import adapter_to_save

logger = logging.getLogger(__name__)


def attach_for_training(
    model: Any, args: ShifConArguments, space: LanguageSpace | LanguageShift | None
) -> ShiftHandle | None:
    """The model's attachment, made if need be; None for a plain run without a language space.

    The shift then belongs to the adapter that is trained: without it (``disable_adapter``) nothing is shifted.

    Raises:
        ValueError: a space is needed and there is none; the space or the area contradicts the arguments.
    """
    handle: ShiftHandle | None = getattr(model, "shifcon", None)
    if handle is None and space is None:
        if args.shift or args.w_mcl or args.keeps_pivot:
            raise ValueError(
                "space: none given; wanted what estimate_space(model, ...) returns (only a run with shift=False "
                "and w_mcl=0, and no w_replay, w_distillation or w_anchor, needs none)"
            )
        return None
    pivot = space.pivot if space is not None else handle.shift.pivot  # type: ignore[union-attr]
    if not is_same_language(pivot, args.pivot):
        raise ValueError(
            f"pivot: got {args.pivot!r}; the space was estimated with {pivot!r} (--pivot {pivot})"
        )
    if handle is not None:
        _use_attachment(handle, args, space)
        return handle
    assert space is not None
    adapter = adapter_to_save(model) if hasattr(model, "active_adapters") else None
    if isinstance(space, LanguageShift):
        return attach(model, space, adapter=adapter)
    forward, backward = choose_area(args, space)
    return attach(
        model,
        space,
        forward,
        backward,
        _alpha(args),
        recipe=args.recipe,  # type: ignore[arg-type]
        intervention=args.intervention,  # type: ignore[arg-type]
        targets=args.targets or (),
        seed=args.seed,
        adapter=adapter,
    )


def _use_attachment(
    handle: ShiftHandle, args: ShifConArguments, space: LanguageSpace | LanguageShift | None
) -> None:
    area = (args.forward, args.backward)
    if area not in ((None, None), (handle.forward, handle.backward)) or handle.recipe != args.recipe:
        raise ValueError(
            f"model: it is attached at [{handle.forward}, {handle.backward}) with recipe {handle.recipe!r}, "
            f"the arguments say {area} and {args.recipe!r}; detach it or leave the area out"
        )
    if args.alpha is not None and args.alpha != handle.alpha:
        raise ValueError(
            f"alpha: got {args.alpha}; the model is attached with {handle.alpha}; detach it or leave alpha out"
        )
    shift = handle.shift
    for name, wanted, here in (
        ("intervention", args.intervention, shift.intervention),
        ("targets", args.targets, list(shift.targets)),
    ):
        if wanted is not None and wanted != here:
            raise ValueError(
                f"{name}: got {wanted}; the model is attached with {here}; detach it or leave {name} out"
            )
    if isinstance(space, LanguageSpace):
        space = space.shift(
            shift.forward,
            shift.backward,
            shift.alpha,
            shift.recipe,
            intervention=shift.intervention,
            targets=shift.targets,
            seed=args.seed,
        )
        space = replace(space, alphas=shift.alphas)
    if space is not None:
        handle.set_shift(space)


def _alpha(args: ShifConArguments) -> float:
    return 1.0 if args.alpha is None else args.alpha


def choose_area(args: ShifConArguments, space: LanguageSpace) -> tuple[int, int]:
    """The area of the arguments, else the recommended one.

    Raises:
        ValueError: a sweep found that no area helps, and the arguments want the shift.
    """
    if args.forward is not None and args.backward is not None:
        return args.forward, args.backward
    area = recommend_area(space, alpha=_alpha(args))
    logger.info("%s", area.reason)
    if area.span is None:
        if args.shift:
            raise ValueError(
                f"shift: {area.reason} That is --no-shift (shift=False); --forward and --backward (forward=, "
                "backward=) overrule the sweep"
            )
        # What harms generation may still serve the contrastive loss, whose pass alone is shifted then.
        area = propose_area(space)
        logger.info("for the contrastive loss: %s", area.reason)
    assert area.span is not None  # a proposal has one
    if space.sweep is None and (args.shift or args.w_mcl):
        warn_once(
            f"forward, backward: none given and no sweep lies by the space; {area.forward} and {area.backward} are "
            "guessed from the distance of the subspaces. What the shift does there, `shifcon sweep` (sweep_area) "
            "measures, and it may find that no area helps"
        )
    return area.span


def check_same_run(checkpoint: Path, handle: ShiftHandle | None, settings: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint whose method was set up in another way.

    Other arguments than it was trained with may be meant, and may be a recipe's of another version: they are said.

    Args:
        settings: as ``ShifConArguments.method_settings`` gives them.

    Raises:
        ValueError: not a checkpoint, or one of another area, recipe or other languages.
    """
    read_trainer_state(checkpoint)
    card: Mapping[str, Any] = read_card(checkpoint)
    area = None if handle is None else {"forward": handle.forward, "backward": handle.backward}
    here: dict[str, Any] = {"area": area}
    if handle is not None:
        shift = handle.shift
        here |= {"languages": list(shift.languages), "recipe": shift.recipe}
        here |= {"intervention": shift.intervention, "targets": list(shift.targets)}
    learns, learnt = handle is not None and handle.learnt_alphas is not None, "alphas" in card
    if learns and not learnt:
        raise ValueError(
            f"{checkpoint / CARD}: its alpha was not learnt, here it is; resume with the arguments of the run"
        )
    if not learns and card["training"].get("learn_alpha"):
        raise ValueError(
            f"{checkpoint / CARD}: learn_alpha is true, here it is false; resume with learn_alpha=True"
        )
    for name, value in here.items():
        if card.get(name, value) != value:
            raise ValueError(
                f"{checkpoint / CARD}: {name} is {card[name]}, here it is {value}; resume with the arguments "
                "and the space of the run"
            )
    trained: Mapping[str, Any] = card["training"]
    differing = [
        f"{name} {trained[name]} (here {value})"
        for name, value in settings.items()
        if name in trained and trained[name] != value
    ]
    if differing:
        logger.warning(
            "%s: was trained with %s; the run goes on with those here", checkpoint, ", ".join(differing)
        )
