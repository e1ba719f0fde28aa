"""Measuring a model in evaluation mode, whatever mode it is in, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and back to the mode that each had.

    Except for bitsandbytes' 4-bit layers, which know no dropout: on CPUs with AVX512-BF16, their first forward in
    evaluation mode repacks the weights in place, and later training loses its gradients without a word.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = any(cls.__name__ == "Linear4bit" for cls in type(module).__mro__)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


_DRAWS = (
    "attention_dropout",
    "activation_dropout",
    "dropout",
    "layerdrop",
    "jitter_noise",
    "router_jitter_noise",
)


def drops_out(model: nn.Module) -> bool:
    """Whether a pass of the model, in the mode that it is in, draws random numbers."""
    return any(
        module.training
        and (
            (isinstance(module, _DropoutNd) and module.p > 0)
            or any(isinstance(share := getattr(module, name, None), float) and share > 0 for name in _DRAWS)
        )
        for module in model.modules()
    )
