"""The matrix products of operators that PyTorch's flop counter does not know."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch


def other_products() -> dict[Any, Callable[..., int]]:
    """How the flop counter counts the operators that it does not know, where they are there.

    bitsandbytes' product with a 4-bit weight (≥ 0.50), and PyTorch's loss from hidden states (2.13), which has
    multiplied with the head for the gradient too by the time its forward returns.
    """
    known: dict[Any, Callable[..., int]] = {}
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        # a (…, K), weight (N, K)
        known[torch.ops.bitsandbytes.gemm_4bit] = lambda a, packed, weight, *_, **__: (
            2 * math.prod(a) * weight[0]
        )
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        import_module("torch.nn.modules.linear_cross_entropy")  # registers it

        def count(hidden: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
            _loss, of_hidden, of_weight, *_rest = out_shape  # (0,) or (0, 0) where no gradient is wanted
            products = 1 + sum(math.prod(each) > 0 for each in (of_hidden, of_weight))
            return products * 2 * math.prod(hidden) * weight[0]

        known[torch.ops.torch_nn._linear_cross_entropy_batch_chunked] = count
    return known
