"""Merged checkpoint: the adapter merged into the base weights, one language's shift baked as a bias of two layers.

Any program that loads the architecture loads it: transformers, vLLM, converters. It speaks one language: every
prompt is shifted. A layer that has a bias has the shift added to it; where none has one, ``mlp_bias`` of the
configuration (Llama, Granite, SmolLM3; ``bias`` of Falcon's) gives every MLP layer one, of zeros but for two.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from shifcon_fast.export.engagement import Engagement, check_engagement
from shifcon_fast.export.output_bias import OutputBias, biases_for
from shifcon_fast.export.plain_copy import plain_copy
from shifcon_fast.export.shift_vectors import ShiftVectors, shift_vectors
from shifcon_fast.modeling.adapters import active_adapter
from shifcon_fast.storage import replacing
from shifcon_fast.version import __version__

logger = logging.getLogger(__name__)

CONFIG = "config.json"
_TARGET = "--to merged"
_FIELDS = ("mlp_bias", "use_bias", "bias")  # of configurations, where the layers may have a bias


def export_merged(
    model: Any, language: str | None, folder: str | Path, *, tokenizer: Any = None
) -> Engagement:
    """Write a plain Hugging Face checkpoint of the trained model with one language's shift in it.

    Quantised weights are written out in the model's dtype, at the values that they were trained with. The check
    loads what was written: memory for one more copy of the model, beside the one that is written.

    Args:
        model: a ``PeftModel`` with one active adapter, attached if a language is given; left as it is.
        language: the one that the checkpoint speaks; None leaves the shift out, for servers that add it themselves.
        folder: made if need be; ``from_pretrained(folder)`` loads it.
        tokenizer: saved beside the weights.

    Returns:
        How far the shift moves the logits, and how far the checkpoint is from the attached model.

    Raises:
        TypeError: not a PEFT model.
        ValueError: nothing to shift; an architecture that has no place for it, with an export that has; files that
            do not engage.
    """
    if not isinstance(model, peft.PeftModel):
        raise TypeError(
            f"model: got {type(model).__name__}; wanted a PeftModel, as shifcon_fast.load returns it"
        )
    name = active_adapter(model)
    vectors = shift_vectors(model, language) if language is not None else None
    biases: Mapping[int, OutputBias] = {}
    if vectors is not None:
        base = plain_copy(model).unload()
        biases = biases_for(vectors, base, _TARGET)
        missing = missing_biases(base, biases, vectors)
    merged = _merge(plain_copy(model), name)
    if vectors is not None:
        _bake(merged, vectors, biases, missing)
        merged.config.shifcon_fast = {
            "version": __version__,
            "language": vectors.language,
            "pivot": vectors.pivot,
            "boundaries": sorted(vectors.at),
        }
    _keep_what_can_be_saved(merged)
    device = model.get_input_embeddings().weight.device
    others = [path.name for path in Path(folder).glob("model*.safetensors*")]
    with replacing(folder, CONFIG, others) as staging:
        merged.save_pretrained(str(staging))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        del merged

        def exported(tokens: Tensor) -> Tensor:
            loaded, found = AutoModelForCausalLM.from_pretrained(
                str(staging), dtype="auto", device_map={"": device}, output_loading_info=True
            )
            if problems := {kind: keys for kind, keys in found.items() if keys}:
                raise ValueError(f"{_TARGET}: what was written does not load whole: {problems}")
            return loaded.eval()(input_ids=tokens.to(device)).logits

        return check_engagement(model, vectors.language if vectors else None, exported, _TARGET)


@dataclass(frozen=True)
class MissingBiases:
    """A field of the configuration that gives layers a bias, and those layers: name → size of the bias."""

    field: str
    layers: Mapping[str, int]


def _merge(copied: Any, name: str) -> PreTrainedModel:
    """The base model with the adapter in its weights, none of them quantised."""
    quantizer = getattr(copied.get_base_model(), "hf_quantizer", None)
    if quantizer is None:
        return copied.merge_and_unload(safe_merge=True)  # writes into no tensor that the copy shares
    logger.info(
        "The quantised weights are written out in full, at the values that the adapter was trained on"
    )
    with tempfile.TemporaryDirectory() as folder:
        copied.save_pretrained(folder, selected_adapters=[name])
        base = copied.unload()
        try:
            base = base.dequantize(dtype=base.get_input_embeddings().weight.dtype)
        except NotImplementedError as error:
            raise ValueError(
                f"{_TARGET}: the base weights cannot be written out in full ({error}); --to peft leaves them "
                "as they are, and --quantization none merges where the unquantised model is at hand (--base)"
            ) from error
        saved = folder if name == "default" else str(Path(folder) / name)
        adapted = peft.PeftModel.from_pretrained(base, saved)
        return adapted.merge_and_unload(safe_merge=True)


def _keep_what_can_be_saved(merged: Any) -> None:
    """Generation settings that contradict each other (Llama 2's) are read by transformers, but not written."""
    own = merged.generation_config
    try:
        own.validate(strict=True)
    except ValueError as error:
        tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        merged.generation_config = GenerationConfig(**tokens)
        reason = str(error).partition("\n")[0]
        logger.warning("The base model's generation settings are left out but for the tokens: %s", reason)


def missing_biases(
    base: Any, biases: Mapping[int, OutputBias], vectors: ShiftVectors
) -> MissingBiases | None:
    """What the checkpoint needs before the shift can be in its biases; None where the layers have them.

    Raises:
        ValueError: the architecture's layers have no bias, and its configuration cannot give them one.
    """
    places = [bias.module for bias in biases.values()]
    if all(base.get_submodule(place).bias is not None for place in places):
        return None
    modules = dict(base.named_modules())
    for field in _FIELDS:
        config = copy.deepcopy(base.config)
        if getattr(config.get_text_config(), field, None) is not False:
            continue
        setattr(config.get_text_config(), field, True)
        with torch.device("meta"):
            grown = type(base)(config)
        new = {
            name: layer.bias.shape[0]
            for name, layer in grown.named_modules()
            if getattr(layer, "bias", None) is not None and getattr(modules[name], "bias", None) is None
        }
        if new.keys() >= set(places):
            return MissingBiases(field, new)
    raise ValueError(
        f"{_TARGET}: a checkpoint of {vectors.model_type} has no bias at {places[0]}, and its configuration gives "
        f"it none ({', '.join(_FIELDS)}), so the shift has no place in it; --to peft takes it, and --to gguf and "
        "--to vllm, beside --to merged --without-shift"
    )


def _bake(
    merged: Any, vectors: ShiftVectors, biases: Mapping[int, OutputBias], missing: MissingBiases | None
) -> None:
    if missing is not None:
        setattr(merged.config.get_text_config(), missing.field, True)
        for name, size in missing.layers.items():
            layer = merged.get_submodule(name)
            layer.bias = nn.Parameter(layer.weight.new_zeros(size))
    for boundary, place in biases.items():
        layer = merged.get_submodule(place.module)
        added = vectors.at[boundary].to(layer.bias.device) / place.scale
        layer.bias = nn.Parameter((layer.bias.float() + added).to(layer.bias.dtype))
