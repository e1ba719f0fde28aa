"""Representations of all processes, with gradients: the pairs of each are negatives of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def pairs_of_processes(count: int, device: torch.device) -> list[int]:
    """How many pairs each process has; all must ask. One collective, and a wait for its result.

    Raises:
        ValueError: a process has none; every process raises it.
    """
    own = torch.tensor([count], device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    counts = [int(each) for each in gathered]
    if 0 in counts:
        raise ValueError(
            f"batch: process {counts.index(0)} has no pair, the processes have {counts}; wanted at least one each"
        )
    return counts


def gather_pairs(representations: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes, in the order of the processes: (L, n, d) to (L, sum(counts), d).

    What is computed of them must be the same on every process: a loss over all pairs. Its gradient comes back to
    this process's rows times the number of processes. The mean over processes that DDP, FSDP and DeepSpeed take of
    gradients then is the gradient of that loss. The backward communicates nothing.

    Args:
        representations: of this process, n = counts[rank] rows.
        counts: rows of every process.
    """
    return _GatherPairs.apply(representations, tuple(counts))


class _GatherPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        layers, rows, size = own.shape
        assert counts[dist.get_rank()] == rows
        filled = own.new_zeros(layers, max(counts), size)  # a collective wants one shape
        filled[:, :rows] = own
        gathered = [torch.empty_like(filled) for _ in counts]
        dist.all_gather(gathered, filled)
        return torch.cat([each[:, :count] for each, count in zip(gathered, counts, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rank, counts = dist.get_rank(), ctx.counts
        first = sum(counts[:rank])
        return gradient[:, first : first + counts[rank]] * len(counts), None
