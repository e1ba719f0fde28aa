"""A forward through the first blocks of a decoder, which looks at what enters them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, MutableMapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from shifcon_fast.modeling.architectures import Decoder


def run_prefix(  # noqa: PLR0917 - a model's inputs, in the order in which models take them
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    wanted: Sequence[int],
    visit: Callable[[int, Tensor], None],
    beside: Beside | None = None,
    **arguments: Any,
) -> None:
    """Run the blocks below the last boundary of ``wanted`` and call ``visit(boundary, hidden_states)`` at each.

    Args:
        decoder: whose blocks.
        input_ids, attention_mask, arguments: what its forward gets.
        wanted: boundaries, in any order.
        visit: called once per distinct boundary, from the first to the last.
        beside: another pass, through the same blocks and maybe more.
    """
    last, after_blocks = max(wanted), decoder.architecture.after_blocks
    known = after_blocks is not None
    # Where it is not known what follows the blocks, what leaves the last one of them is looked at.
    prefix = _prefix(decoder, last if known else max(last, 1), frozenset(wanted), visit, beside)
    for name in after_blocks or ():
        if prefix._modules.get(name) is not None:
            prefix._modules[name] = nn.Identity()
    output = prefix(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **arguments
    )
    if known:
        visit(last, output.last_hidden_state)


class Beside:
    """The unshifted pass beside another one: from the block at whose input the other is shifted first, no graph.

    Args:
        first: that block.
        last: the boundary at which it ends.
        wanted, visit: it calls ``visit(boundary, hidden_states)`` at those of ``wanted`` after ``first``.
    """

    def __init__(
        self, first: int, last: int, wanted: frozenset[int], visit: Callable[[int, Tensor], None]
    ) -> None:
        self.first, self.last = first, last
        self._wanted, self._visit = wanted, visit
        self._hidden_states: Tensor | None = None
        self._shared: dict[int, Any] = {}

    @torch.no_grad()
    def step(
        self, index: int, block: nn.Module, hidden_states: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run block ``index``, which the other pass enters with ``hidden_states``; what the block gives."""
        if self._hidden_states is None:
            self._hidden_states = hidden_states.detach()
        # What blocks tell each other (keys and values that later ones use again) is each pass's own.
        own = {
            name: self._own(value) if isinstance(value, MutableMapping) else value
            for name, value in kwargs.items()
        }
        output = block(self._hidden_states, *args, **{**own, "language_ids": None})
        self._hidden_states = output[0] if isinstance(output, tuple) else output
        if index + 1 in self._wanted:
            self._visit(index + 1, self._hidden_states)
        return output

    def _own(self, shared: Any) -> Any:
        return self._shared.setdefault(id(shared), copy.copy(shared))


class _PooledBlock(nn.Module):
    """Stands around a block and looks at its input, or at its output.

    Outside of the block's gradient checkpointing, which wraps the block's forward: they are seen once, not again
    when the block is recomputed.
    """

    def __init__(
        self,
        block: nn.Module,
        look: Callable[[Tensor], None] | None,
        look_after: Callable[[Tensor], None] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.block = block
        self.look = look
        self.look_after = look_after
        self.beside: Callable[..., Any] | None = None  # another pass through the block
        self.runs = True  # whether the block is part of this one

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _loses_gradients(self.block, hidden_states):
            hidden_states = hidden_states.detach().requires_grad_()
        if self.look is not None:
            self.look(hidden_states)
        other = None if self.beside is None else self.beside(hidden_states, args, kwargs)
        if not self.runs:
            return (hidden_states, *other[1:]) if isinstance(other, tuple) else hidden_states
        output = self.block(hidden_states, *args, **kwargs)
        if self.look_after is not None:
            self.look_after(output[0] if isinstance(output, tuple) else output)
        return output

    def __getattr__(self, name: str) -> Any:
        # Some decoders read facts off their blocks, such as the kind of attention.
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "block"), name)

    @property
    def __class__(self) -> Any:
        # Others (Jamba's of transformers 5.0) ask what kind of block it is.
        return type(self.block)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("the class of a view of a block cannot be changed")


def _loses_gradients(block: nn.Module, hidden_states: Tensor) -> bool:
    """Whether reentrant checkpointing would cut the graph: it tracks nothing unless an input requires grad."""
    if hidden_states.requires_grad or not (torch.is_grad_enabled() and block.training):
        return False
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
    return bool(getattr(block, "gradient_checkpointing", False) and reentrant)


def _prefix(
    decoder: Decoder,
    length: int,
    wanted: frozenset[int],
    visit: Callable[[int, Tensor], None],
    beside: Beside | None = None,
) -> nn.Module:
    """A view of the decoder that has only its first blocks; it shares every weight with it."""
    prefix = copy.copy(decoder.module)
    prefix.__dict__["_modules"] = dict(decoder.module._modules)
    blocks = [
        _PooledBlock(block, functools.partial(visit, index) if index in wanted else None)
        for index, block in enumerate(list(decoder.blocks)[:length])
    ]
    if decoder.architecture.after_blocks is None and length in wanted:
        blocks[-1].look_after = functools.partial(visit, length)
    if beside is not None:
        last = max(length, beside.last)
        blocks += [_PooledBlock(block, None) for block in list(decoder.blocks)[length:last]]
        for index in range(beside.first, beside.last):
            blocks[index].beside = functools.partial(beside.step, index, decoder.blocks[index])
            blocks[index].runs = index < length
    prefix._modules[decoder.architecture.blocks] = nn.ModuleList(blocks)
    # accelerate's device hooks live in the instance and are bound to the whole decoder; bind them to the view.
    for key in prefix.__dict__.keys() & {"forward", "_old_forward"}:
        kept = prefix.__dict__[key]
        hooked = isinstance(kept, functools.partial)
        prefix.__dict__[key] = (
            functools.partial(kept.func, prefix) if hooked else MethodType(kept.__func__, prefix)
        )
    return prefix
