"""Which PEFT adapter of a model is active."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def active_adapter(model: Any) -> str:
    """The name of the one adapter that is active.

    Raises:
        ValueError: several are.
    """
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"model: has the active adapters {names}; wanted one: call model.set_adapter(name)")
    return str(names[0])


def adapted_module(decoder: nn.Module, adapter: str) -> nn.Module:
    """A module of an adapter, which knows whether it is active; it goes on saying so once adapters are merged.

    Raises:
        ValueError: no such adapter.
    """
    layers = [layer for layer in decoder.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        if any(adapter in getattr(layer, name) for name in layer.adapter_layer_names):
            return layer
    known = sorted({name for layer in layers for name in layer.active_adapters})
    raise ValueError(f"adapter: got {adapter!r}; the model has no such PEFT adapter (active: {known})")
