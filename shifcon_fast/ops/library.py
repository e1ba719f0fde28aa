"""The ``shifcon_fast`` operator library: one schema per operator, whatever backend runs it.

``Library.define`` + ``impl`` rather than ``@custom_op``, which costs several microseconds a call. What is left of
the dispatcher's cost, about 15 µs a differentiable call and so several times a small kernel, is paid only by those
who need the dispatcher: ``torch.compile``, dispatch modes, tensor subclasses, functorch. Plain eager tensors go to
the same kernel and the same gradient formula directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shifcon_fast.ops.registry import IMPLS, Backend, select

NAMESPACE = "shifcon_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), float, int, bool, str, torch.dtype})


def _is_plain_eager(args: tuple[Any, ...]) -> bool:
    """Nobody watches the dispatcher: not compiling, no modes, no transforms, no tensor subclasses."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and _PLAIN.issuperset(map(type, args))
    )


def direct_backend(operator: str, args: tuple[Any, ...]) -> Backend | None:
    """The backend that may be called at once, without the operator's checks: it has its own.

    ``None`` unless the call is plain, eager and without gradients. ``args`` are those of the operator's schema: the
    first decides device and dtype, the last is impl.
    """
    like, impl = args[0], args[-1]
    if (
        type(like) is torch.Tensor
        and like.is_floating_point()  # select would warn of a slow backend where the dtype is refused
        and impl in IMPLS
        and _is_plain_eager(args)
        and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
    ):
        backend = select(operator, impl, like.device, like.dtype)
        return backend if backend.checks_arguments else None
    return None


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define an operator and return what calls it.

    Args:
        schema: name, arguments and returns in PyTorch's schema language.
        kernel: runs the operator on any device.
        fake: gives its outputs' shapes and dtypes (always contiguous).
        backward, setup_context: the gradient formula, as for :func:`torch.library.register_autograd`; an operator
            without them is not differentiable.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    if backward is None or setup_context is None:

        def call(*args: Any) -> Any:
            return kernel(*args) if _is_plain_eager(args) else overload(*args)

        return call

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )
    differentiable = _eager_function(name, kernel, backward, setup_context)

    def call_differentiable(*args: Any) -> Any:
        if not _is_plain_eager(args):
            return overload(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiable(*args)
        return kernel(*args)

    return call_differentiable


def _eager_function(
    name: str, kernel: Callable[..., Any], formula: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = kernel(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            return formula(ctx, *gradients)

    Eager.__name__ = Eager.__qualname__ = name  # what autograd graphs and profilers show
    return Eager.apply


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an operator computes in: float32, or float64 for float64 inputs (so that gradcheck works)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
