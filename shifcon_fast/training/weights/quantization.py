"""Load a base model for QLoRA: NF4 weights with double quantisation, LoRA adapters in float32, on CUDA or CPU.

Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized LLMs*. Quantisation is bitsandbytes', adapters are
PEFT's; what is added here are the settings that make them train correctly on both devices.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from shifcon_fast.notices import warn_once
from shifcon_fast.storage import cache_root
from shifcon_fast.training.weights.checkpointing import enable_gradient_checkpointing, enable_unless_it_fits
from shifcon_fast.training.weights.linear_speed import faster_dtype, has_native_bfloat16, known_speed
from shifcon_fast.training.weights.nf4_linear import BLOCK

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "none"]
DTYPES = ("float32", "bfloat16", "float16")


def load_quantized(
    name_or_path: str | Path,
    lora: Any = None,
    quantization: Quantization = "nf4",
    *,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool | None = None,
    quant_storage: torch.dtype | None = None,
) -> Any:
    """Load a causal language model with frozen base weights and, if asked for, trainable LoRA adapters.

    Unlike ``peft.prepare_model_for_kbit_training`` nothing is cast up: norms, embeddings and the LM head stay in
    ``dtype``; the adapters are float32.

    Args:
        name_or_path: Hugging Face id or folder.
        lora: a ``peft.LoraConfig`` for a model to be trained; None for a frozen model in eval mode.
        quantization: "nf4" (4-bit NormalFloat in blocks of 64 weights, scales quantised too) or "none". The LM head
            and tied weights are never quantised; nor, on the CPU, are layers whose input size is no multiple of 64,
            which bitsandbytes' CPU kernel dequantises wrongly (a warning names them).
        dtype: of hidden states and of weights that are not quantised. None chooses bfloat16 on CUDA (float16 on
            devices without it); on the CPU float32, but bfloat16 where the checkpoint itself is stored in 16 bits
            and this processor multiplies faster in bfloat16, which is measured once (``linear_speed``) and said.
        device_map: as in ``from_pretrained``; None puts the whole model on this process's CUDA device or the CPU.
        trust_remote_code: run model code that comes with the checkpoint.
        gradient_checkpointing: recompute activations in the backward pass (the non-reentrant kind). Only with lora.
            None: unless a ``ShifConTrainer`` finds that they fit (:mod:`.checkpointing`).
        quant_storage: dtype in which the bytes of 4-bit weights are kept. FSDP2 shards floating ones alone. None:
            bytes, or ``dtype`` where ``accelerate launch`` says that FSDP will be used.

    Returns:
        A ``PeftModel`` in training mode, or the ``PreTrainedModel`` itself in eval mode if ``lora`` is None.

    Raises:
        ValueError: an unknown ``quantization``; no model there.
        RuntimeError: NF4 does not work on this machine.
    """
    if quantization not in ("nf4", "none"):
        raise ValueError(f'quantization: got {quantization!r}; wanted "nf4" or "none"')
    device = _device()
    if device_map is None:
        device_map = {"": device}
    on_cpu = _is_on_cpu(device_map)
    config = read_config(name_or_path, trust_remote_code)
    dtype = dtype or choose_dtype(torch.device("cpu") if on_cpu else device, config.dtype, quantization)
    settings: dict[str, Any] = {}
    if quantization == "nf4":
        if problem := nf4_problem(torch.device("cpu") if on_cpu else device):
            raise RuntimeError(
                f"NF4 does not work here: {problem}. quantization='none' (--quantization none) goes on in "
                f"{dtype}"
            )
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=quant_storage or (dtype if fsdp_is_asked_for() else None),
            llm_int8_skip_modules=_modules_to_skip(config, trust_remote_code) if on_cpu else None,
        )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            **settings,
        )
    except OSError as error:
        raise ValueError(
            f"name_or_path: {name_or_path} holds no model that can be loaded: {error}"
        ) from error
    keep_4bit_trainable(model)
    model.requires_grad_(False)
    if lora is None:
        return model.eval()

    from peft import get_peft_model

    if gradient_checkpointing is None:
        enable_unless_it_fits(model)
    elif gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return get_peft_model(model, lora).train()


def read_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of this name; None and "auto" are None, which chooses.

    Raises:
        ValueError: another name.
    """
    if name in (None, "auto"):
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype: got {name!r}; wanted auto, {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, str(name))
    return found


def keep_4bit_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes' CPU layers in the weight layout that autograd understands.

    On CPUs with AVX512-BF16 a ``Linear4bit`` that runs in eval mode repacks its weights in place (bitsandbytes
    0.50, nn/modules.py, ``_convert_weight_packed_for_cpu``), and every later training step goes through an
    operator without a backward: gradients of all layers below vanish without an error. The repacking also asserts
    out_features % 32 == 0. Copies of a model keep the setting.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def nf4_problem(device: torch.device) -> str | None:
    """Why NF4 weights cannot be used on a device, or None: a matrix is quantised and read back."""
    try:
        from bitsandbytes import functional

        weight = torch.linspace(-1, 1, BLOCK * BLOCK, device=device).reshape(BLOCK, BLOCK)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    except Exception as problem:  # a missing package, library or driver, each with an error of its own
        return f"bitsandbytes: {problem} (pip install -U bitsandbytes)"
    # The widest gap between two NF4 levels is 0.3 of the block's maximum.
    return None if error < 0.2 else f"bitsandbytes returns weights that are off by {error:.2f} on {device}"


def fsdp_is_asked_for() -> bool:
    """By `accelerate launch`, or by accelerate itself, which says so where it gets a plugin."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    from accelerate import PartialState

    return torch.device("cuda", PartialState().local_process_index % torch.cuda.device_count())


def _is_on_cpu(device_map: Any) -> bool:
    if isinstance(device_map, dict):
        return all(str(device) == "cpu" for device in device_map.values())
    return str(device_map) == "cpu" or not torch.cuda.is_available()


def read_config(name_or_path: str | Path, trust_remote_code: bool) -> Any:
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        hint = (
            "; it is an adapter, load it with shifcon_fast.load"
            if (path / "adapter_config.json").is_file()
            else ""
        )
        raise ValueError(f"name_or_path: {path} has no config.json; wanted a folder with a model{hint}")
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(f"{error} (--trust-remote-code)") from error
        raise
    except OSError as error:
        raise ValueError(
            f"name_or_path: {name_or_path} is neither a folder nor a model on the Hugging Face hub: {error}"
        ) from error


def choose_dtype(device: torch.device, stored: torch.dtype | None, quantization: Quantization) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if stored not in (torch.bfloat16, torch.float16) or not has_native_bfloat16():
        return torch.float32  # emulated products are many times slower
    speed = known_speed(quantization)
    if speed is None:
        warn_once(
            f"dtype: float32, since {cache_root()} cannot be written, in which the processes would find one answer "
            "to which dtype is faster here (--dtype, or SHIFCON_CACHE)"
        )
        return torch.float32
    chosen = faster_dtype(speed)
    warn_once(
        f"dtype: {str(chosen).removeprefix('torch.')}: {speed['processor']} multiplies {quantization} weights at "
        f"{speed['bfloat16']:.0f} GFLOP/s in bfloat16 and {speed['float32']:.0f} in float32 (measured; "
        "--dtype overrules)"
    )
    return chosen


def _modules_to_skip(config: Any, trust_remote_code: bool) -> list[str] | None:
    """Linear layers that must keep their weights on the CPU, or None if transformers' own choice is enough."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    unfit = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % BLOCK
    }
    head = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is head]
    kept += [name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair]
    for name in kept:
        unfit.pop(name, None)
    if not unfit:
        return None
    sizes = ", ".join(map(str, sorted(set(unfit.values()))))
    logger.warning(
        "%d linear layers (%s, …) keep unquantised weights: bitsandbytes' NF4 on the CPU needs an input size "
        "that is a multiple of %d, theirs is %s",
        len(unfit),
        next(iter(unfit)),
        BLOCK,
        sizes,
    )
    return sorted({*unfit, *kept})
