"""What a training run sets up before its first step: attachment, contrastive batches, vectors, length limits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shifcon_fast.data.languages import is_same_language
from shifcon_fast.modeling.attach import ShiftHandle, attach
from shifcon_fast.modeling.vocabulary import embedding_rows
from shifcon_fast.objective.vectors import LanguageVectors
from shifcon_fast.space.area import propose_area, recommend_area
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.storage import read_tensors
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.checkpoints import CARD, read_trainer_state
from shifcon_fast.training.contrastive_data import ContrastiveSampler
from shifcon_fast.training.run_folder import read_card

logger = logging.getLogger(__name__)

VECTORS = "language_vectors.safetensors"  # of a checkpoint


def attach_for_training(
    model: Any, args: ShifConArguments, space: LanguageSpace | None
) -> ShiftHandle | None:
    """The model's attachment, made if need be; None for a plain run without a language space.

    Raises:
        ValueError: a space is needed and there is none; the space or the area contradicts the arguments.
    """
    handle: ShiftHandle | None = getattr(model, "shifcon", None)
    if handle is None and space is None:
        if args.shift or args.w_mcl:
            raise ValueError(
                "space: none given; wanted what estimate_space(model, ...) returns (only a run with shift=False "
                "and w_mcl=0 needs none)"
            )
        return None
    space = space or handle.space  # type: ignore[union-attr]
    if not is_same_language(space.pivot, args.pivot):
        raise ValueError(
            f"pivot: got {args.pivot!r}; the space was estimated with {space.pivot!r} (--pivot {space.pivot})"
        )
    if handle is not None:
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
        handle.set_space(space)
        return handle
    forward, backward = choose_area(args, space)
    return attach(model, space, forward, backward, _alpha(args), recipe=args.recipe)  # type: ignore[arg-type]


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
    return area.span


def make_sampler(
    args: ShifConArguments,
    handle: ShiftHandle | None,
    parallel: Mapping[str, Sequence[str]] | None,
    tokenizer: Any,
) -> ContrastiveSampler | None:
    """Contrastive batches; None where neither the loss nor the vectors need any.

    Raises:
        ValueError: they are needed and there is no parallel text.
    """
    follows = args.vectors in ("ema", "running") and (args.shift or args.w_mcl)
    if handle is None or not (args.w_mcl or follows):
        return None
    if parallel is None:
        reason = f"w_mcl is {args.w_mcl}" if args.w_mcl else f"vectors={args.vectors!r} follows its sentences"
        raise ValueError(f"parallel: none given; wanted translations, for {reason}")
    return ContrastiveSampler(
        parallel,
        handle.space.pivot,
        tokenizer,
        handle.space.language_id,
        batch_size=int(args.contrastive_batch_size or 0),
        mixed_languages=bool(args.mixed_languages),
        max_length_pivot=within_context(args.max_length_pivot, handle.model),
        max_length_other=within_context(args.max_length_other, handle.model),
        pool_all_tokens=args.recipe == "official",
        seed=args.seed,
        embedding_rows=embedding_rows(handle.model),
    )


def check_same_run(checkpoint: Path, handle: ShiftHandle | None) -> None:
    """Refuse to resume from a checkpoint whose method was set up in another way.

    Raises:
        ValueError: not a checkpoint, or one of another area, recipe or other languages.
    """
    read_trainer_state(checkpoint)
    card: Mapping[str, Any] = read_card(checkpoint)
    area = None if handle is None else {"forward": handle.forward, "backward": handle.backward}
    here: dict[str, Any] = {"area": area}
    if handle is not None:
        here |= {"languages": list(handle.space.languages), "recipe": handle.recipe}
    for name, value in here.items():
        if card[name] != value:
            raise ValueError(
                f"{checkpoint / CARD}: {name} is {card[name]}, here it is {value}; resume with the arguments "
                "and the space of the run"
            )


def track_vectors(args: ShifConArguments, handle: ShiftHandle | None, model: Any) -> LanguageVectors | None:
    """The vectors at f and b, as ``args.vectors`` has them follow training."""
    if handle is None:
        return None
    dtype = model.get_input_embeddings().weight.dtype if args.running_dtype_of_model else torch.float64
    return LanguageVectors(
        handle.space,
        (handle.forward, handle.backward),
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


def within_context(length: int | None, model: Any) -> int:
    """A number of tokens, or the model's context if that is shorter (or nothing is said)."""
    limits = [limit for limit in (length, getattr(model.config, "max_position_embeddings", None)) if limit]
    return min(limits)
