"""The layer of a block whose bias is added to the block's output unchanged: where a shift can be a bias.

In a pre-norm block, r ← r + M(N2 r), that is the MLP's last layer; a constant on its output is a constant on the
next block's input. Some blocks scale the branch first (Granite). Where a norm follows the MLP (Gemma 2, OLMo-2), or
tokens are routed to experts, no layer has this property. A table of names would have to know every architecture; a
block can be asked instead: a constant is added to a layer's output, and the block's output must move by that
constant at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shifcon_fast.export.shift_vectors import ShiftVectors
from shifcon_fast.modeling.architectures import Architecture, Decoder, locate_decoder

_TOKENS = 6
# Of the constant's length: rounding alone gives 1e-6 in float32 and 4e-3 in bfloat16, an MLP's answer 0.1 and up.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_TOLERANCE_OF_16_BITS = 0.03


@dataclass(frozen=True)
class OutputBias:
    """A layer whose output is added to the residual stream.

    Attributes:
        module: its name in the model.
        scale: what its output is multiplied by on the way; a bias must be divided by it.
    """

    module: str
    scale: float


def output_biases(model: nn.Module, blocks: Sequence[int]) -> dict[int, OutputBias]:
    """For each of some blocks, the layer whose bias is a constant on the block's output; left out where none is.

    Args:
        model: detached and without adapters, in eval mode.
        blocks: which, each in 0 … L-1.
    """
    decoder = locate_decoder(model)
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for index in blocks:
        arguments = _inputs_of(decoder, index)
        block = decoder.blocks[index]
        for layer in reversed(_candidates(block, decoder.hidden_size)):
            measured = _scale_to_the_output(block, layer, arguments)
            scale = None if measured is None else _exact(measured, block, decoder.architecture)
            if scale is not None:
                found[index] = OutputBias(names[layer], scale)
                break
    return found


def biases_for(vectors: ShiftVectors, base: nn.Module, target: str) -> dict[int, OutputBias]:
    """boundary → the layer that ends the block before it.

    Args:
        vectors: a language's.
        base: detached and without adapters, in eval mode.
        target: for the error.

    Raises:
        ValueError: the first boundary is 0, or a block has no such layer; the message names what works instead.
    """
    vectors.refuse_below(
        1,
        target,
        "nothing runs before block 0 that could have a bias",
        "No server format reaches it: train with forward >= 1 (2 for --to gguf), or serve with shifcon_fast.load",
    )
    found = output_biases(base, [boundary - 1 for boundary in vectors.at])
    missing = sorted(boundary - 1 for boundary in vectors.at if boundary - 1 not in found)
    if missing:
        raise ValueError(
            f"{target}: {vectors.model_type} has no layer in block {missing[0]} whose bias reaches the block's "
            "output unchanged (a norm follows its MLP, or tokens are routed to experts), so the shift cannot be a "
            "bias; --to gguf (control vector, llama.cpp) and --to vllm (hotwire) add it behind the block instead, "
            "beside --to merged --without-shift"
        )
    return {boundary: found[boundary - 1] for boundary in vectors.at}


def _candidates(block: nn.Module, hidden_size: int) -> list[nn.Module]:
    """Linear layers of a block that write vectors of the residual stream's size."""

    return [
        layer
        for layer in block.modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and sizes(layer)[1] == hidden_size
    ]


def sizes(layer: Any) -> tuple[int, int]:
    """Length of what a linear layer reads and of what it writes."""
    if isinstance(layer, Conv1D):  # GPT-2's
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


class _Reached(Exception):
    """The block's inputs are known; the rest of the pass is of no use."""


@torch.no_grad()
def _inputs_of(decoder: Decoder, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the decoder passes to a block for a few tokens."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    embedding = decoder.module.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.arange(1, 1 + _TOKENS, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    hook = decoder.blocks[index].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder.module(input_ids=tokens, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


@torch.no_grad()
def _scale_to_the_output(
    block: nn.Module, layer: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> float | None:
    """s where adding c to the layer's output adds s c to every token of the block's; None where it does not."""
    args, kwargs = arguments
    before = _hidden(block(*args, **kwargs)).float()
    constant = torch.randn(before.shape[-1], generator=torch.Generator().manual_seed(0)).to(before)
    constant = constant * before.square().mean().sqrt()

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + constant.to(output.dtype)

    hook = layer.register_forward_hook(add)
    try:
        out = _hidden(block(*args, **kwargs))
    finally:
        hook.remove()
    moved = (out.float() - before).double()
    wanted = constant.double()
    scale = float((moved @ wanted).mean() / wanted.square().sum())
    error = float((moved - scale * wanted).norm(dim=-1).max() / wanted.norm())
    tolerance = _TOLERANCE.get(out.dtype, _TOLERANCE_OF_16_BITS)
    return scale if abs(scale) > 10 * tolerance and error < tolerance else None


def _exact(measured: float, block: nn.Module, row: Architecture) -> float | None:
    """The scale that was measured but for rounding: 1, or the one that the block keeps; None if it is neither."""
    kept = getattr(block, row.residual_multiplier) if row.residual_multiplier else 1.0
    return next((each for each in (1.0, float(kept)) if abs(measured - each) < 0.05 * abs(each)), None)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
