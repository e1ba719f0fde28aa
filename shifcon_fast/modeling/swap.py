"""Swapping the class of a live module for a subclass made on the fly, and putting it back.

Why the class and not ``module.forward``: gradient checkpointing wraps ``forward`` at class level, so a forward set
on the instance silently switches it off, while a subclass of transformers' ``GradientCheckpointingLayer`` is
wrapped again by ``__init_subclass__``. The subclass keeps ``__name__``, ``__qualname__`` and ``__module__``: device
maps, FSDP policies and transformers' registry of recordable outputs go by them.

One subclass is made per original class and holds no state of any model. State lives in the instances, so a deep
copy of an attached model, or a pickled one, is an attached model of its own. Nothing in it leads back to the model,
which is freed with the last reference to it, without the garbage collector.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from shifcon_fast.modeling.architectures import Architecture, architecture_of_class, shift_alone
from shifcon_fast.modeling.attachment import ATTACHMENT, Attachment
from shifcon_fast.modeling.block_shift import keep_float32
from shifcon_fast.modeling.blocks import block_forward
from shifcon_fast.modeling.routing import Routing

Modules = type[nn.Module]

HANDLES = "_shifcon_handles"
"""Name of the attribute, on the model whose ``shifcon`` users ask for, that is its :class:`.Attachment`."""
_ORIGINAL = "_shifcon_original"


def original_class(module: nn.Module) -> Modules | None:
    """The class that a module had before :func:`swap_class`; None if its class is not one of ours."""
    return type(module).__dict__.get(_ORIGINAL)


def swap_class(module: nn.Module, replacement: Modules) -> None:
    """Give a module another class.

    Raises:
        ValueError: something has replaced ``forward`` on the instance, which would bypass the new class.
    """
    original = type(module)
    key, kept = _kept_forward(module)
    if kept is not None and not _is_bound_to(kept, original):
        raise ValueError(
            f"model: the forward of a {original.__name__} was replaced on the instance, which hides its class's "
            "forward. Attach before whatever replaces it (such as Accelerator.prepare)."
        )
    module.__class__ = replacement
    if kept is not None:
        _bind_kept_forward(module, key)


def restore_class(module: nn.Module) -> None:
    """Give a swapped module its class back.

    A forward that somebody has put on the instance in the meantime (mixed precision does) stays there; what it
    wraps finds no attachment any more and calls the original.
    """
    key, kept = _kept_forward(module)
    follows = kept is not None and _is_bound_to(kept, type(module))
    original = original_class(module)
    assert original is not None
    module.__class__ = original
    if follows:
        _bind_kept_forward(module, key)


def _kept_forward(module: nn.Module) -> tuple[str, Any]:
    """A forward in the instance: accelerate's ``device_map`` hooks keep the one they wrap as a bound method."""
    key = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    return key, module.__dict__.get(key)


def _is_bound_to(kept: Any, cls: Any) -> bool:
    return isinstance(kept, MethodType) and kept.__func__ is cls.forward


def _bind_kept_forward(module: Any, key: str) -> None:
    """Bind the class's present forward in the instance, or the swapped one would never run."""
    bound = MethodType(type(module).forward, module)
    setattr(module, key, bound)
    if key == "_old_forward":  # what inspect.signature sees of the hook is what it wraps
        hook = module.__dict__["forward"]
        hook.__dict__.pop("__signature__", None)
        functools.update_wrapper(hook, bound)


def block_class(original: Any) -> Modules:
    """The subclass of a decoder block class that shifts and norms through the operators."""
    return _block_class(original, architecture_of_class(original) or shift_alone("", original.__name__))


@functools.cache
def _block_class(original: Any, row: Architecture) -> Modules:

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        keep_float32(self, lambda: original._apply(self, fn, recurse))
        return self

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The decoder does not pass the ids on. Fetched here, outside of gradient checkpointing, they are an
        # argument of the checkpointed forward, and its recomputation gets the same ones.
        kwargs.setdefault("language_ids", self.__dict__[ATTACHMENT].call.current)
        return original.__call__(self, *args, **kwargs)

    methods: dict[str, Any] = {"forward": block_forward(original, row), "_apply": _apply}
    if not row.forwards_kwargs:
        methods["__call__"] = __call__
    return _subclass(original, methods, block_class)


@functools.cache
def decoder_class(original: Any) -> Modules:
    """The subclass of a decoder whose ``forward`` checks ``language_ids`` and hands them to its blocks."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, language_ids: Tensor | None = None, **kwargs: Any) -> Any:
        attachment = self.__dict__.get(ATTACHMENT)
        if attachment is None:  # detached, and called through a wrapper that was put on in between
            return original.forward(self, *args, **kwargs)
        call = attachment.call
        if language_ids is None:
            language_ids = call.pending
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        routing = attachment.route(language_ids, tokens, kwargs)
        if routing is not None:
            return routed(self, routing, args, kwargs)
        ids = attachment.prepare(language_ids, tokens)
        if ids is None:
            return original.forward(self, *args, **kwargs)
        return run(self, ids, args, kwargs)

    def run(self: nn.Module, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment = self.__dict__[ATTACHMENT]
        if attachment.forwards_kwargs:
            return original.forward(self, *args, language_ids=ids, **kwargs)
        attachment.call.current = ids
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            attachment.call.current = None

    def routed(self: nn.Module, routing: Routing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.__dict__[ATTACHMENT].call
        call.routing = routing
        try:
            output = run(self, routing.ids, args, kwargs)
        finally:
            call.routing = None
        routing.keep(kwargs, output)
        call.detected = routing.detected or call.detected
        return output

    named = _name_language_ids(forward, original)
    return _subclass(original, {"forward": named, "shifcon": property(_handle)}, decoder_class)


@functools.cache
def outer_class(original: Any) -> Modules:
    """The subclass of a model with a head whose ``forward`` names ``language_ids``.

    ``generate`` refuses keyword arguments that the signature does not name, and ``Trainer`` drops such columns.
    """

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, language_ids: Tensor | None = None, **kwargs: Any) -> Any:
        attachment = self.__dict__.get(ATTACHMENT)
        if language_ids is None or attachment is None:
            return original.forward(self, *args, **kwargs)
        if attachment.forwards_kwargs:
            return original.forward(self, *args, language_ids=language_ids, **kwargs)
        attachment.call.pending = language_ids
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            attachment.call.pending = None

    named = _name_language_ids(forward, original)
    return _subclass(original, {"forward": named, "shifcon": property(_handle)}, outer_class)


def _handle(self: nn.Module) -> Any:
    """The handle of an attached model; ``AttributeError`` for the parts of one."""
    attachment: Attachment | None = self.__dict__.get(HANDLES)
    if attachment is None:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'shifcon'")
    return attachment.handle_of(self)


def _subclass(original: Modules, attributes: dict[str, Any], maker: Callable[[Any], Modules]) -> Modules:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # By its name alone, pickle would find the original class.
        return _remake, (maker, original), self.__dict__

    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        _ORIGINAL: original,
    }
    return type(original.__name__, (original,), {**names, **attributes})


def _remake(maker: Callable[[Any], Modules], original: Modules) -> nn.Module:
    """An empty module of a class of ours, for ``copy`` and ``pickle`` to fill."""
    cls = maker(original)
    return cls.__new__(cls)


def _name_language_ids(forward: Callable[..., Any], original: Modules) -> Callable[..., Any]:
    signature = inspect.signature(original.forward)
    named = inspect.Parameter(
        "language_ids", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None
    )
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:at], named, *parameters[at:]]
    )
    return forward
