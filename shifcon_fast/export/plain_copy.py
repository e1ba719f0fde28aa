"""A detached copy of a model that shares its weights: what exports change in place of the user's."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def plain_copy(model: Any) -> Any:
    """Copy the modules of a model and none of its weights, and take ShifCon off the copy.

    Assigning to a parameter's ``data`` in the copy leaves the original alone; writing into the tensor does not.
    bitsandbytes' packed weights are the same objects in both.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        shared[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if plain else parameter
    copied = copy.deepcopy(model, shared)
    handle = getattr(copied, "shifcon", None)
    if handle is not None:
        handle.detach()
    return copied.eval()
