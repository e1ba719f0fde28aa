"""A randomly initialised decoder in NF4 with LoRA, built on its device one block at a time.

``load_quantized`` reads a checkpoint; a random one of Llama-3-8B's shape would have to be written (16 GB) first.
Here each block is made on the device, quantised there and dropped, so that besides the finished 4-bit weights no
more than one block is ever held. Everything else is as ``load_quantized`` does it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shifcon_fast.modeling.architectures import ARCHITECTURES, locate_decoder
from shifcon_fast.training.quantization import enable_gradient_checkpointing, keep_4bit_trainable


@dataclass(frozen=True)
class Size:
    """A model's shape and a step's: tokens are rows × length, sentences come in pairs of two lengths.

    Attributes:
        config: arguments of the configuration.
        area: (f, b).
        generation: rows and length of the instruction batch.
        pairs: number of translation pairs, tokens of a pivot sentence, tokens of its translation.
        model_type: of the configuration.
    """

    config: dict[str, Any]
    area: tuple[int, int]
    generation: tuple[int, int]
    pairs: tuple[int, int, int]
    model_type: str = "llama"


_LLAMA_3 = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
_RECIPE: dict[str, Any] = {"generation": (14, 512), "pairs": (12, 100, 256)}
# What two CPU cores do in seconds; the area is the middle third.
_SMALL: dict[str, Any] = {"generation": (4, 128), "pairs": (8, 48, 96)}
SIZES = {
    # The shape of Llama-3-8B, with the authors' area and batch.
    "llama-3-8b": Size(
        _LLAMA_3
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        area=(12, 15),
        **_RECIPE,
    ),
    # The shape of Llama-3.2-1B, for devices with less memory; the area is at the same share of the depth.
    "1b": Size(
        _LLAMA_3
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        area=(6, 8),
        **_RECIPE,
    ),
    # The shape of SmolLM2-135M.
    "smollm2": Size(
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        area=(10, 20),
        **_SMALL,
    ),
    # The shape of Gemma-3-270M, whose vocabulary has 63 % of its parameters.
    "gemma3": Size(
        {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
            "layer_types": [
                "full_attention" if index % 6 == 5 else "sliding_attention" for index in range(18)
            ],
        },
        area=(6, 12),
        model_type="gemma3_text",
        **_SMALL,
    ),
    "tiny": Size(
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        area=(1, 3),
        generation=(2, 16),
        pairs=(4, 4, 8),  # two pivot sentences fill a row
    ),
}


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
