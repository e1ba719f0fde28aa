"""A randomly initialised decoder in NF4 with LoRA, built on its device one block at a time.

``load_quantized`` reads a checkpoint; a random one of Llama-3-8B's shape would have to be written (16 GB) first.
Here each block is made on the device, quantised there and dropped, so that besides the finished 4-bit weights no
more than one block is ever held. Everything else is as ``load_quantized`` does it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from shapes import Size
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shifcon_fast.modeling.architectures import ARCHITECTURES, locate_decoder
from shifcon_fast.training.weights.checkpointing import enable_gradient_checkpointing
from shifcon_fast.training.weights.quantization import keep_4bit_trainable


def build(
    size: Size, device: torch.device, *, rank: int = 16, seed: int = 0, checkpointing: bool = True
) -> Any:
    """A PEFT model in training mode; LoRA on every linear layer of the blocks.

    LoRA's second matrices are random, not zero, so that every gradient is dense.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = size.config["num_hidden_layers"]
    config = AutoConfig.for_model(size.model_type, **size.config)
    config.num_hidden_layers = 0
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config = model.config  # the library may have taken a copy
    config.num_hidden_layers = layers
    make_block = _block_class(size.model_type, model.model)
    for index in range(layers):
        with torch.device(device):
            block = make_block(config, index).to(dtype)
        _quantise(block, config.initializer_range, dtype, device)
        model.model.layers.append(block)
    model.is_loaded_in_4bit = True  # what tells PEFT to put its 4-bit LoRA layers there
    keep_4bit_trainable(model)
    model.requires_grad_(False)
    if checkpointing:
        enable_gradient_checkpointing(model)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        init_lora_weights=False,
    )
    with torch.device(device):
        model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.02)
    return model.train()


def _block_class(model_type: str, decoder: nn.Module) -> Any:
    name = next(row.block for row in ARCHITECTURES.values() if row.model_type == model_type)
    return getattr(sys.modules[type(decoder).__module__], name)


def _quantise(block: nn.Module, deviation: float, dtype: torch.dtype, device: torch.device) -> None:
    import bitsandbytes as bnb

    for name, linear in list(block.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        replacement = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        replacement.weight = bnb.nn.Params4bit(
            linear.weight.data.normal_(0.0, deviation),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=replacement,
        )
        parent, _, child = name.rpartition(".")
        setattr(block.get_submodule(parent), child, replacement.to(device))  # the move quantises


def on_every_norm(model: nn.Module, visit: Callable[[nn.Module], None]) -> None:
    """Visit the blocks' RMSNorms that are fused in an attached model."""
    decoder = locate_decoder(model)
    for block in decoder.blocks:
        for name in decoder.architecture.norm_sites(block):
            visit(getattr(block, name))
