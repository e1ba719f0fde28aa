"""Gradient checkpointing where memory asks for it, unless somebody asked for it or against it.

``load_quantized`` turns it on; that it was nobody's wish is remembered, and the trainer turns it off before the
first step where all activations are predicted to fit (:mod:`.activation_memory`). The gradients are the same either
way.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.vocabulary import within_context
from shifcon_fast.notices import warn_once
from shifcon_fast.training.losses.chunked_cross_entropy import IN_PLACE
from shifcon_fast.training.weights.activation_memory import Micro, judge

logger = logging.getLogger(__name__)

_NOBODYS_WISH = "shifcon_fast_checkpointing_is_a_default"


def enable_gradient_checkpointing(model: Any) -> None:
    """Turn on the non-reentrant kind; the reentrant one loses LoRA gradients unless inputs require them."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers ≥ 5.20
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def enable_unless_it_fits(model: Any) -> None:
    """Turn it on for a model whose trainer may turn it off again."""
    enable_gradient_checkpointing(model)
    setattr(model, _NOBODYS_WISH, True)


def disable_gradient_checkpointing(model: Any) -> None:
    """Keep all activations."""
    disable = getattr(model, "activation_checkpointing_disable", None)  # transformers ≥ 5.20
    (disable or model.gradient_checkpointing_disable)()


def choose_checkpointing(
    model: nn.Module,
    args: Any,
    *,
    longest: int | None,
    backward: int | None,
    in_chunks: bool,
    apart: bool,
) -> None:
    """Turn a default off where activations fit, and say what was chosen and why; before the first step.

    ``gradient_checkpointing`` of the arguments (transformers 5.20: ``activation_checkpointing``) decides where it
    was given: True is transformers' affair, False turns it off.

    Args:
        model: of the trainer, on its device.
        args: of the trainer.
        longest: tokens of the longest example, if known; else ``max_length`` is reckoned with.
        backward: boundary b, where the contrastive pass ends; None without one.
        in_chunks: whether the generation loss takes a chunk of logits at a time.
        apart: whether the contrastive loss goes through backward before the generation pass.
    """
    chosen_by = next((each for each in model.modules() if getattr(each, _NOBODYS_WISH, False)), None)
    wish = args.checkpointing_wish
    if wish is False and any(getattr(each, "gradient_checkpointing", False) for each in model.modules()):
        disable_gradient_checkpointing(chosen_by or model)
    if wish is not None or chosen_by is None:
        return
    if problem := _not_predicted(args):
        logger.info("gradient checkpointing stays on: %s", problem)
        return
    decoder = locate_decoder(model)
    rows, length = args.per_device_train_batch_size, longest or within_context(args.max_length, model)
    generation = rows * min(length, args.max_length or length)
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator,union-attr]
    logits = generation * vocabulary
    pairs, share = 0, 0.0
    if backward is not None:
        pairs = min(
            args.contrastive_batch_size, args.contrastive_mini_batch_size or args.contrastive_batch_size
        )
        share = max(0, backward - 1) / decoder.num_boundaries
    verdict = judge(
        model,
        Micro(
            generation=generation,
            contrastive=pairs * ((args.max_length_pivot or 0) + (args.max_length_other or 0)),
            contrastive_share=share,
            logits=min(logits, IN_PLACE) if in_chunks else logits,
            apart=apart,
        ),
    )
    if verdict.keeps:
        disable_gradient_checkpointing(chosen_by)
    warn_once(str(verdict))


def _not_predicted(args: Any) -> str | None:
    """What a run has that the prediction knows nothing of, or None."""
    if args.world_size > 1 or args.n_gpu > 1:
        return "what other processes and shards take is not predicted"
    if args.torch_compile:
        return "what a compiled model keeps is not predicted"
    if args.keeps_pivot:
        return "what the losses that keep the pivot take is not predicted"
    return None
