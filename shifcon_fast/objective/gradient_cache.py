"""Gradient caching: a contrastive loss over more pairs than the activations of one pass leave room for.

Gao et al. 2021, *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup* (arXiv 2101.06983): first
the representations of all mini-batches, of which only those are kept; then the loss and its gradient in them; then
each mini-batch once more, with its activations, through which that gradient goes on to the weights. Exact: the loss
and gradients are those of one pass, dropout included, whose random states each second pass gets back.

The second passes run inside of the one ``backward`` that the caller calls, as recomputation
(``torch.utils.checkpoint``), not as backward passes of their own. So each weight receives its gradient once, and
what waits for it needs to know nothing: DDP's and FSDP's reductions, DeepSpeed, a gradient scaler, accumulation.
The mini-batch that the backward begins with is not run twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Part = TypeVar("Part")


def encode_in_turns(encode: Callable[[Part], Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """``encode`` of each part; the activations of one part at a time are held, now and in the backward.

    Args:
        encode: a differentiable function of a part, which may draw random numbers.
        parts: of the batch. Tensors in them must lie where ``encode`` computes: the random states of those devices
            are kept.

    Returns:
        What ``encode`` returns, with a graph to the weights.
    """
    *earlier, last = parts
    # Without an early stop, which leaves the forward of a block in the middle: FSDP's hooks wait for its end.
    found = [checkpoint(encode, part, use_reentrant=False, early_stop=False) for part in earlier]
    return [*found, encode(last)]


def passes_needed(pairs: Sequence[int], mini_batch_size: int | None) -> int:
    """In how many passes every process runs its pairs: as many as the one with the most pairs needs.

    Each process runs as many as the others, since sharded weights are gathered anew for every pass.

    Args:
        pairs: of each process.
        mini_batch_size: pairs in one pass; None for all.

    Raises:
        ValueError: a size below 1, or a process with fewer pairs than passes.
    """
    if mini_batch_size is None:
        return 1
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size: got {mini_batch_size}; wanted 1 pair or more")
    passes = math.ceil(max(pairs) / mini_batch_size)
    if passes > min(pairs):
        raise ValueError(
            f"batch: the processes have {list(pairs)} pairs, and the most need {passes} passes with "
            f"mini_batch_size = {mini_batch_size}; wanted at least as many pairs on each process"
        )
    return passes
