"""Cross entropy of an LM head's predictions from hidden states, a chunk of the logits at a time.

    loss = Σ_i -log softmax(softcap(scale · head(h_i)))[target_i]

over learnt tokens alone: no position whose label is ignored meets the head. Which of three ways it goes is
:func:`way`'s choice:

* ``liger``: Liger's ``liger_fused_linear_cross_entropy``, on CUDA.
* ``torch``: ``torch.nn.functional.linear_cross_entropy`` (torch 2.13) for plain frozen heads in float32 or
  float64; in 16 bits it would return the sum in 16 bits, and convert the whole head on a CPU.
* ``autograd``: any other head (4-bit, with an adapter, trained, softcapped) through its own module.

All take the gradient of a chunk while its logits are there, so that the head is multiplied with twice, not three
times: the loss is a sum, whose gradient is known before the backward pass but for a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from shifcon_fast.notices import warn_once
from shifcon_fast.training.losses.learnt_tokens import Runs
from shifcon_fast.training.losses.liger import liger_problem

Way = Literal["liger", "torch", "autograd"]

# Logits of a chunk. torch's loss works in place; autograd keeps them, their log probabilities and gradients.
IN_PLACE, _KEPT = 2**25, 2**24
# With fewer tokens of a group than this, reading the head once for each group costs more than what "torch" saves.
_TOKENS_OF_A_GROUP = 64


class Finish(NamedTuple):
    """What a model does to its head's output, in this order.

    Attributes:
        scale: the factor of Cohere's and Granite's logits, and others'.
        softcap: Gemma 2's c in c · tanh(x / c).
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


NOTHING = Finish()
"""Logits as they leave the head."""


class HeadLoss(NamedTuple):
    """Losses of n tokens.

    Attributes:
        total: () float32 or float64, their sum in nats, with a graph where one is wanted.
        nll: (n,), each token's, without a graph; None where only the groups' are known.
        groups, sums, counts: (G,) each: the groups there are, the summed losses of each (no graph), its tokens.
    """

    total: Tensor
    nll: Tensor | None
    groups: Tensor | None = None
    sums: Tensor | None = None
    counts: Tensor | None = None


def chunked_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    groups: Tensor | Runs | None = None,
    finish: Finish = NOTHING,
) -> HeadLoss:
    """The summed loss of tokens, and that of each token or of each group.

    Args:
        head: the LM head, (…, d) → (…, V).
        hidden: (n, d), of learnt tokens.
        targets: (n,) int64, what each is to predict.
        groups: (n,) integers; losses are summed by them where those of tokens are not known. They are counted
            first, which waits for the device; of tokens that lie group by group :class:`.Runs` say it without.
        finish: what the model does to the logits.
    """
    gradients = torch.is_grad_enabled() and hidden.requires_grad
    runs, order = groups if isinstance(groups, Runs) else None, None
    if isinstance(groups, Tensor) and gradients:
        groups, order = groups.sort(stable=True)
        runs = Runs.of(groups)
    chosen = way(head, hidden, finish) if gradients else "autograd"
    few = runs is not None and len(targets) < _TOKENS_OF_A_GROUP * len(runs.sizes)
    if not len(targets) or (chosen == "torch" and few):
        chosen = "autograd"
    if chosen == "autograd":
        return HeadLoss(*_by_autograd(head, hidden, targets, finish))
    summed = _by_liger if chosen == "liger" else _by_torch
    if runs is None:
        total = summed(head, hidden, targets, finish)
        return HeadLoss(total, None)
    if order is not None:
        hidden, targets = hidden[order], targets[order]
    parts = zip(hidden.split(runs.sizes), targets.split(runs.sizes), strict=True)
    sums = torch.stack([summed(head, part, target, finish) for part, target in parts])
    return HeadLoss(sums.sum(), None, runs.ids, sums.detach(), runs.counts)


def way(head: nn.Module, hidden: Tensor, finish: Finish = NOTHING) -> Way:
    """How a head's loss and gradients are computed here."""
    device = hidden.device.type
    exact_scale = math.frexp(finish.scale)[0] in (
        0.5,
        -0.5,
    )  # a power of two, which hidden states take unrounded
    if not exact_scale or not _is_plain(head, hidden) or torch.is_autocast_enabled(device):
        return "autograd"
    if device == "cuda" and has_liger():
        return "liger"
    exact = hidden.dtype in (torch.float32, torch.float64) and finish.softcap is None
    return "torch" if exact and hasattr(nn, "LinearCrossEntropyOptions") else "autograd"


def has_liger() -> bool:
    """Whether Liger's loss can be used; one that is too old is said once."""
    problem = liger_problem()
    if problem is not None and "too old" in problem:
        warn_once(f"Liger's fused loss is not used, but PyTorch's: {problem}")
    return problem is None


def _is_plain(head: nn.Module, hidden: Tensor) -> bool:
    """Whether a head is its frozen weight and bias, on the spot, and nothing else."""
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return False
    if head._forward_hooks or head._forward_pre_hooks:
        return False
    tensors = [head.weight, *([] if head.bias is None else [head.bias])]
    return all(
        type(each) is nn.Parameter  # not a shard
        and not hasattr(each, "ds_id")  # nor DeepSpeed's placeholder of one
        and not each.requires_grad
        and each.device == hidden.device
        and each.dtype == hidden.dtype
        for each in tensors
    )


def _by_liger(head: Any, hidden: Tensor, targets: Tensor, finish: Finish) -> Tensor:
    fused = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    hidden, bias = _scaled(head, hidden, finish)
    total: Tensor = fused(hidden, head.weight, targets, bias=bias, reduction="sum", softcap=finish.softcap)
    return total


def _by_torch(head: Any, hidden: Tensor, targets: Tensor, finish: Finish) -> Tensor:
    hidden, bias = _scaled(head, hidden, finish)
    rows = min(len(hidden), max(1, IN_PLACE // head.weight.shape[0]))
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return functional.linear_cross_entropy(
        hidden, head.weight, targets, linear_bias=bias, reduction="sum", options=options
    )


def _scaled(head: Any, hidden: Tensor, finish: Finish) -> tuple[Tensor, Tensor | None]:
    """Hidden states and bias whose product with the weight is the scaled logits."""
    if finish.scale == 1.0:
        return hidden, head.bias
    return hidden * finish.scale, None if head.bias is None else head.bias * finish.scale


def _by_autograd(head: nn.Module, hidden: Tensor, targets: Tensor, finish: Finish) -> tuple[Tensor, Tensor]:
    """(total, nll), through the head's own forward."""

    def losses(part: Tensor, target: Tensor) -> Tensor:
        logits = finish(head(part))
        exact = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(exact, target, reduction="none")

    vocabulary = getattr(head, "out_features", 2**15)
    rows = max(1, _KEPT // vocabulary)
    trained = [each for each in head.parameters() if each.requires_grad]
    total, nll = _ChunkedLoss.apply(losses, rows, targets, hidden, *trained)
    return total, nll.detach()


class _ChunkedLoss(torch.autograd.Function):
    """Sum of losses whose gradients are taken chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        losses: Callable[[Tensor, Tensor], Tensor],
        rows: int,
        targets: Tensor,
        hidden: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        _, _, _, of_hidden, *of_trained = ctx.needs_input_grad
        wanted = [each for each, needed in zip(trained, of_trained, strict=True) if needed]
        found, parts = [], []
        sums: list[Tensor | None] = [None] * len(wanted)
        for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            if not (of_hidden or wanted):
                found.append(losses(part, target))
                continue
            with torch.enable_grad():
                part = part.detach().requires_grad_(of_hidden)
                # Not the leaf: PyTorch's counter of operations hooks what a module is given, and refuses leaves.
                nll = losses(part.view_as(part), target)
                inputs = [*([part] if of_hidden else []), *wanted]
                gradients = list(torch.autograd.grad(nll.sum(), inputs, allow_unused=True))
            found.append(nll.detach())
            del nll  # and with it the chunk's logits
            if of_hidden:
                parts.append(gradients.pop(0))
            sums = [
                a if b is None else b if a is None else a + b for a, b in zip(sums, gradients, strict=True)
            ]
        nll = torch.cat(found)
        rest = iter(sums)
        ctx.gradients = [
            torch.cat(parts) if of_hidden else None,
            *(next(rest) if needed else None for needed in of_trained),
        ]
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx: Any, factor: Tensor, _: Any) -> tuple[Any, ...]:
        return None, None, None, *(each if each is None else each * factor for each in ctx.gradients)
