"""``torch_compile=True``: what would break the graph of an attached model's training step is taken out of its way.

``accelerate`` compiles the model that the trainer calls: the generation pass, forward and backward. The contrastive
pass and estimates run the model's own blocks, which stay eager.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback


class KeepCompilable(TrainerCallback):
    """:func:`compilable` while a trainer with ``torch_compile`` trains, once it has set up checkpointing."""

    def __init__(self) -> None:
        self._training = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._training.close()
        if args.torch_compile:
            self._training.enter_context(compilable(model))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training.close()


@contextmanager
def compilable(model: nn.Module) -> Iterator[None]:
    """Without the hooks that have embeddings require gradients.

    PEFT puts them on every model that is checkpointed, for the reentrant kind, which tracks nothing unless an input
    requires gradients. The other kind needs none, and ``requires_grad_`` breaks the graph inside of PEFT's context
    manager, which leaves the whole forward uncompiled. Found on the modules: transformers forgets all but the last.
    """
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in () if _is_reentrant(model) else model.modules():
        hooks = module._forward_hooks
        if any(map(_makes_inputs_require_grads, hooks.values())):
            taken.append((hooks, hooks.copy()))
            for key, hook in list(hooks.items()):
                if _makes_inputs_require_grads(hook):
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.update(before)


def _makes_inputs_require_grads(hook: Any) -> bool:
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def _is_reentrant(model: nn.Module) -> bool:
    functions = (module.__dict__.get("_gradient_checkpointing_func") for module in model.modules())
    return any(getattr(each, "keywords", {}).get("use_reentrant", False) for each in functions)
