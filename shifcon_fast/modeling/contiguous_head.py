"""The LM head fed with contiguous hidden states, which a CPU needs for speed and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """The hidden states that reach the head made contiguous.

    ``generate`` asks for the last position's logits of every prompt, a slice that is not contiguous. PyTorch
    multiplies it with a frozen matrix row by row (``at::matmul`` folds contiguous batches only), and in bfloat16 on
    a CPU copies the matrix for every row: GiB, and most of a batch's time, for a large vocabulary.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        yield
        return

    def make_contiguous(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in args)

    hook = head.register_forward_pre_hook(make_contiguous)
    try:
        yield
    finally:
        hook.remove()
