"""A linear layer made NF4 where it is, without a checkpoint: for measuring, and for models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BLOCK = 64
"""Weights that share one scale."""


def nf4_linear(linear: nn.Linear) -> Any:
    """A ``bitsandbytes.nn.Linear4bit`` with a linear layer's weight, as ``load_quantized`` makes it.

    Args:
        linear: on the device where it is to be; its dtype is the one that is computed in.
    """
    import bitsandbytes as bnb

    weight = linear.weight.data
    packed = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    packed.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
    )
    if linear.bias is not None:
        packed.bias = linear.bias
    packed = packed.to(weight.device)  # which quantises
    packed.support_avx512bf16_for_cpu = False  # why: quantization.keep_4bit_trainable
    return packed


def quantise_blocks(blocks: nn.Module) -> None:
    """Put NF4 layers in the place of the linear layers of a module whose input size allows it."""
    for name, linear in list(blocks.named_modules()):
        if type(linear) is nn.Linear and linear.in_features % BLOCK == 0:
            parent, _, child = name.rpartition(".")
            with torch.no_grad():
                setattr(blocks.get_submodule(parent), child, nf4_linear(linear))
