"""PEFT alone: the trained LoRA adapter with one language's shift as a bias, for stock ``PeftModel``.

A LoRA layer with ``lora_bias`` adds scaling · (B A x + c). With c = shift / scaling on the layer that ends block
k-1, what it adds is the shift of boundary k, at every token. PEFT has one ``lora_bias`` for the whole adapter, so
all other layers carry a bias of zeros. Layers that training did not adapt get a LoRA of rank 1 with zero weights.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from shifcon_fast.export.engagement import Engagement, check_engagement
from shifcon_fast.export.output_bias import OutputBias, biases_for, sizes
from shifcon_fast.export.plain_copy import plain_copy
from shifcon_fast.export.shift_vectors import ShiftVectors, shift_vectors
from shifcon_fast.modeling.adapters import active_adapter
from shifcon_fast.storage import replacing
from shifcon_fast.version import __version__

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WORKS = "--to merged takes it if the architecture has biases, --to gguf and --to vllm in any case"
# They leave the base model alone, so that a loader may start from zeros instead; the others take the base apart.
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def export_peft(model: Any, language: str, folder: str | Path, *, tokenizer: Any = None) -> Engagement:
    """Write an adapter that holds the trained LoRA weights and one language's shift.

    Args:
        model: an attached ``PeftModel`` with one active LoRA adapter; left as it is.
        language: the one whose rows the adapter is for; in PEFT's mixed batches, give those rows its name.
        folder: made if need be; ``PeftModel.from_pretrained(base, folder)`` loads it, quantised base or not.
        tokenizer: saved beside it.

    Returns:
        How far it moves the logits, and how far it is from the attached model: checked by loading it.

    Raises:
        TypeError: not a PEFT model.
        ValueError: nothing to shift; an architecture or an adapter that has no place for the shift, with an export
            that has; files that do not engage.
    """
    if not isinstance(model, peft.PeftModel):
        raise TypeError(
            f"model: got {type(model).__name__}; wanted an attached PeftModel, as shifcon_fast.load returns it"
        )
    vectors = shift_vectors(model, language)
    name = active_adapter(model)
    copied = plain_copy(model)
    biases = biases_for(vectors, plain_copy(copied).unload(), "--to peft")
    config = _checked_config(copied, name)
    tensors = peft.get_peft_model_state_dict(copied, adapter_name=name)
    adapted = {
        key.removeprefix(_PREFIX): layer
        for key, layer in copied.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    }
    _add_layers(config, tensors, adapted, biases, copied)
    _add_biases(tensors, vectors, biases, {key: adapted[key].scaling[name] for key in adapted})
    _say_if_the_base_has_to_grow(copied)
    with replacing(folder, CONFIG, (WEIGHTS,)) as staging:
        metadata = {
            "format": "pt",
            "shifcon_fast": __version__,
            "shifcon_language": vectors.language,
            "shifcon_pivot": vectors.pivot,
            "shifcon_boundaries": ",".join(map(str, sorted(vectors.at))),
        }
        # Clones, as PEFT saves them: an embedding that grew is listed under two names.
        save_file(
            {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, staging / WEIGHTS, metadata
        )
        config.save_pretrained(str(staging))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))

        def exported(tokens: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*lora_bias=True.*")  # that it cannot be merged
                copied.load_adapter(str(staging), adapter_name="exported", is_trainable=False)
            copied.set_adapter("exported")
            device = copied.get_input_embeddings().weight.device
            return copied(input_ids=tokens.to(device)).logits

        return check_engagement(model, vectors.language, exported, "--to peft")


def _checked_config(model: Any, name: str) -> peft.LoraConfig:
    """A copy of the adapter's configuration, with a bias.

    Raises:
        ValueError: an adapter that PEFT gives no bias.
    """
    config = copy.deepcopy(model.peft_config[name])
    if config.peft_type != peft.PeftType.LORA:
        raise ValueError(f"--to peft: the adapter is {config.peft_type}, which has no bias; {_WORKS}")
    for field in ("target_parameters", "layer_replication"):
        if getattr(config, field, None):
            raise ValueError(f"--to peft: PEFT has no lora_bias for {field}; {_WORKS}")
    if config.init_lora_weights not in _HARMLESS_STARTS:
        raise ValueError(
            f"--to peft: the adapter starts from {config.init_lora_weights!r}, for which PEFT has no lora_bias; "
            f"{_WORKS}"
        )
    for key, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if name in layer.lora_embedding_A:
            raise ValueError(f"--to peft: PEFT has no lora_bias for the embedding {key!r}; {_WORKS}")
        if variant := layer.lora_variant.get(name):  # DoRA, aLoRA, ...
            raise ValueError(
                f"--to peft: the adapter is a {type(variant).__name__}, which has no bias of its own or not at "
                f"every token; {_WORKS}"
            )
    config.init_lora_weights = True
    config.lora_bias = True
    config.inference_mode = True
    return config


def _add_layers(
    config: peft.LoraConfig,
    tensors: dict[str, Tensor],
    adapted: dict[str, Any],
    biases: dict[int, OutputBias],
    model: Any,
) -> None:
    """Give layers that have no adapter one that adds nothing yet, and have the configuration name them."""
    added = sorted({bias.module for bias in biases.values()} - adapted.keys())
    if not added:
        return
    for module in added:
        inputs, outputs = sizes(model.get_base_model().get_submodule(module))
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = torch.zeros(1, inputs)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = torch.zeros(outputs, 1)
    # Every layer by its whole name: patterns, "all-linear" and choices of layers have been resolved by PEFT.
    config.target_modules = sorted({*adapted, *added})
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    # First, since the first pattern that fits counts. Scaling is then 1, with rsLoRA too.
    config.rank_pattern = {**dict.fromkeys(added, 1), **config.rank_pattern}
    config.alpha_pattern = {**dict.fromkeys(added, 1), **config.alpha_pattern}


def _add_biases(
    tensors: dict[str, Tensor],
    vectors: ShiftVectors,
    biases: dict[int, OutputBias],
    scaling: dict[str, float],
) -> None:
    for key in [each for each in tensors if each.endswith(".lora_B.weight")]:
        bias = f"{key.removesuffix('.weight')}.bias"
        tensors.setdefault(bias, torch.zeros(tensors[key].shape[0]))
    for boundary, place in biases.items():
        key = f"{_PREFIX}{place.module}.lora_B.bias"
        constant = vectors.at[boundary] / (place.scale * scaling.get(place.module, 1.0))
        tensors[key] = tensors[key].float().cpu() + constant


def _say_if_the_base_has_to_grow(model: Any) -> None:
    """A resized embedding is in the adapter's file, but the loader's base model has the stored number of rows."""
    base = model.get_base_model()
    rows = base.get_input_embeddings().weight.shape[0]
    source = getattr(base.config, "_name_or_path", "") or model.active_peft_config.base_model_name_or_path
    if not source:
        return
    try:
        stored = AutoConfig.from_pretrained(source, local_files_only=True).get_text_config().vocab_size
    except (OSError, ValueError):
        return
    if stored != rows:
        logger.warning(
            "The adapter carries an embedding of %d rows where the base model has %d: before it is loaded, "
            "base.resize_token_embeddings(%d)",
            rows,
            stored,
            rows,
        )
