"""Losses that keep the pivot language where it is: replay, distillation from the base model, anchoring.

Over the pivot sentences of a contrastive batch, every token after the first:

    L_replay       = mean of -log p(token)
    L_distillation = mean of KL(p_base ‖ p), p_base without adapters (Li & Hoiem 2017, arXiv 1606.09282)

Both go through the whole model once, unshifted, with the logits of some tokens at a time. And over the sentences s,
at the boundaries k = f and b of the area, with r(s, k) the unshifted representation and r_base without adapters:

    L_anchor       = mean of ‖r(s, k) - r_base(s, k)‖² / ‖r_base(s, k)‖²

(as REPINA, Razdaibiedina et al. 2022, arXiv 2205.11603, keeps representations while it fine-tunes). Each sentence
is divided by its own norm, so that the loss of a step is the same however its sentences are spread over batches and
processes. It takes r from the contrastive pass where that passes the pivot unshifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.attachment import unshifted
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.evaluation_mode import evaluation_mode
from shifcon_fast.objective.mcl import ContrastiveBatch
from shifcon_fast.training.losses.chunked_cross_entropy import chunked_cross_entropy
from shifcon_fast.training.losses.loss_without_logits import finish_of

REPLAY, DISTILLATION, ANCHOR = "loss_replay", "loss_distillation", "loss_anchor"
_LOGITS = 2**23  # of a chunk, of both models


def pivot_losses(
    model: Any, batch: ContrastiveBatch, *, replay: bool, distillation: bool
) -> dict[str, Tensor]:
    """The losses that are asked for, () float32 each, with a graph to the adapters.

    Args:
        model: a PEFT model around a causal LM, attached or not.
        batch: its first half are the pivot sentences.
    """
    half = batch["input_ids"].shape[0] // 2
    device = next(model.parameters()).device
    mask = batch["attention_mask"][:half]
    length = int(mask.sum(1).max()) if mask.device.type == "cpu" else mask.shape[1]
    mask, tokens = (each[:half, :length].to(device) for each in (mask, batch["input_ids"]))
    told = (mask[:, 1:] * mask[:, :-1]).bool()
    hidden = _hidden(model, tokens, mask)[told]
    head = model.get_output_embeddings()
    finish = finish_of(model.config.get_text_config())
    found = {}
    if replay:
        loss = chunked_cross_entropy(head, hidden, tokens[:, 1:][told], finish=finish)
        found[REPLAY] = loss.total / len(hidden)
    if distillation:
        with torch.no_grad(), model.disable_adapter():
            of_base = _hidden(model, tokens, mask)[told]

        def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
            log_p = functional.log_softmax(finish(head(ours)).float(), dim=-1)
            with torch.no_grad(), model.disable_adapter():
                log_base = functional.log_softmax(finish(head(theirs)).float(), dim=-1)
            return functional.kl_div(log_p, log_base, reduction="sum", log_target=True)

        rows = max(1, _LOGITS // int(model.config.get_text_config().vocab_size))
        parts = zip(hidden.split(rows), of_base.split(rows), strict=True)
        sums = [checkpoint(divergence, a, b, use_reentrant=False) for a, b in parts]
        found[DISTILLATION] = torch.stack(sums).sum() / len(hidden)
    return found


def anchor_loss(pivot: Tensor, base: Tensor) -> Tensor:
    """L_anchor, () float32, differentiable in ``pivot``.

    Args:
        pivot, base: (2, N, d) representations of the pivot's sentences at f and b; ``base`` of the model without
            adapters.
    """
    base = base.detach().float()
    distance = (pivot.float() - base).square().sum(-1)
    return (distance / base.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def pivot_representations(
    model: Any, batch: ContrastiveBatch, boundaries: Sequence[int], *, keep_massive: bool = False
) -> Tensor:
    """(len(boundaries), N, d) float32 of a batch's pivot sentences, by an unshifted pass of their own."""
    half = batch["input_ids"].shape[0] // 2
    return boundary_representations(
        model,
        batch["input_ids"][:half],
        batch["attention_mask"][:half],
        batch["pool_mask"][:half],
        boundaries,
        keep_massive=keep_massive,
    )


@torch.no_grad()
def base_representations(
    model: Any, batch: ContrastiveBatch, boundaries: Sequence[int], *, keep_massive: bool = False
) -> Tensor:
    """:func:`pivot_representations` without adapters and dropout: the model as it was before training."""
    with evaluation_mode(model), model.disable_adapter():
        return pivot_representations(model, batch, boundaries, keep_massive=keep_massive)


def _hidden(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, T-1, d), what the head reads of all positions but the last, unshifted."""
    decoder = locate_decoder(model).module
    with unshifted(decoder):
        output = decoder(input_ids=tokens, attention_mask=mask, use_cache=False, return_dict=True)
    hidden: Tensor = output.last_hidden_state[:, :-1]
    return hidden
