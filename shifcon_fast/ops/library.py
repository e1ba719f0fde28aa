"""The ``shifcon_fast`` operator library: one schema per operator, whatever backend runs it.

``Library.define`` + ``impl`` rather than ``@custom_op``: the decorator costs several microseconds a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "shifcon_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator; ``kernel`` runs on every device, ``fake`` gives shapes and dtypes. Returns the overload."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give the operator ``name`` its gradient formula."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an operator computes in: float32, or float64 for float64 inputs (so that gradcheck works)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
