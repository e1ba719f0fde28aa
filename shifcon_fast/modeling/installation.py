"""Putting an attachment into a model's modules, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shifcon_fast.modeling.architectures import Decoder
from shifcon_fast.modeling.attachment import ATTACHMENT, Attachment
from shifcon_fast.modeling.block_shift import put_shift, remove_shift
from shifcon_fast.modeling.norms import NORM_COUNTS, NormCounts
from shifcon_fast.modeling.swap import (
    HANDLES,
    block_class,
    decoder_class,
    original_class,
    outer_class,
    restore_class,
    swap_class,
)


def install(decoder: Decoder, outer: nn.Module, attachment: Attachment) -> None:
    """Swap the classes of the blocks, the decoder and the model, and give them what they share."""
    for index, block in enumerate(decoder.blocks):
        block.__dict__[NORM_COUNTS] = NormCounts(index)
        block.__dict__[ATTACHMENT] = attachment
        _swap(block, block_class)
    put_tables(decoder, attachment)
    decoder.module.__dict__[ATTACHMENT] = attachment
    _swap(decoder.module, decoder_class)
    if outer is not decoder.module:
        outer.__dict__[ATTACHMENT] = attachment
        _swap(outer, outer_class)
    outer.__dict__[HANDLES] = attachment


def put_tables(decoder: Decoder, attachment: Attachment) -> None:
    """Register what the blocks add or do to their inputs, as buffers, which move with them."""
    maps = attachment.maps()
    for index, table in attachment.tables().items():
        put_shift(decoder.blocks[index], table, maps.get(index))


def _swap(module: nn.Module, subclass: Callable[[Any], type[nn.Module]]) -> None:
    swap_class(module, subclass(type(module)))


def uninstall(decoder: Decoder, outer: nn.Module) -> None:
    """Undo :func:`install`, or as much of it as was done."""
    for module in swapped_modules(decoder, outer):
        if original_class(module) is not None:
            restore_class(module)
        for name in (ATTACHMENT, NORM_COUNTS, HANDLES):
            module.__dict__.pop(name, None)
    for block in decoder.blocks:
        remove_shift(block)


def swapped_modules(decoder: Decoder, outer: nn.Module) -> list[nn.Module]:
    """The modules whose class :func:`install` swaps."""
    return [*decoder.blocks, decoder.module, *([] if outer is decoder.module else [outer])]


def outermost_model(model: nn.Module, decoder: nn.Module) -> nn.Module:
    """The Hugging Face model that users call: the one with the head, inside of PEFT's and other wrappers."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(part is decoder for part in module.modules()):
            return module
    return decoder
