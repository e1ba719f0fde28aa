"""Telling whether a language space was made with this model.

The answer must survive what does not change the residual stream's coordinates: loading in 4 bits or another dtype,
training a LoRA adapter, moving the folder. So the identity is the configuration's shape plus a sketch of the input
embedding, which quantisation leaves alone and adapters wrap; it is compared within the rounding of bfloat16. How
the weights are quantised is noted beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shifcon_fast.modeling.architectures import locate_decoder

_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_SKETCH_ROWS, _SKETCH_COLUMNS, _SKETCH_VOCABULARY = 16, 8, 1024
_SKETCH_TOLERANCE = 0.02  # relative; bfloat16 rounds by at most 2⁻⁸ ≈ 0.004


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """A JSON-able description by which a model is recognised again.

    Args:
        model: anything that :func:`.locate_decoder` accepts; with or without adapters, quantised or not. Where
            its weights are sharded, every process must call this.

    Returns:
        The compared fields of the configuration, ``config_sha256`` over them, ``embedding`` (a sample of the input
        embedding as floats, or None where its weights are not in memory), ``quantization`` (see
        :func:`quantization_of`; no part of the identity), and ``name_or_path`` for the reader.

    Raises:
        ValueError: no decoder in the model, or more than one.
    """
    decoder = locate_decoder(model)
    config = decoder.module.config
    fields = {name: getattr(config, name, None) for name in _FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return {
        **fields,
        "num_blocks": decoder.num_boundaries,
        "config_sha256": digest,
        "embedding": _embedding_sketch(decoder.module),
        "quantization": quantization_of(model),
        "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
    }


def quantization_of(model: nn.Module) -> str | None:
    """How the weights are held: "nf4", "fp4", "int8", or the method's name, such as "gptq"; None as they are."""
    # A text decoder inside of another model does not say it, and what wraps a model has no config.
    configs = (getattr(each, "config", None) for each in (model, locate_decoder(model).module))
    found = (getattr(each, "quantization_config", None) for each in configs)
    config = next((each for each in found if each is not None), None)
    if config is None:
        return None
    settings = config if isinstance(config, Mapping) else config.to_dict()
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "4bit"))
    if settings.get("load_in_8bit"):
        return "int8"
    method = settings.get("quant_method")
    return str(getattr(method, "value", method))


def quantization_note(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """What to say where vectors were estimated on a model's other weights; None where they are alike or unknown."""
    if "quantization" not in expected or expected["quantization"] == found["quantization"]:
        return None
    there, here = (each["quantization"] or "not quantised" for each in (expected, found))
    return (
        f"space: it was estimated on this model {there}, which is {here} here; 4-bit weights move the language "
        "vectors of small models by a tenth. Estimate a space on the weights that it is used with (shifcon profile "
        "--quantization)"
    )


def fingerprint_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What differs between the fingerprint a space was made with and a model's, in words; empty if nothing does."""
    differences = [
        f"{name} {expected[name]} there, {found[name]} here"
        for name in (*_FIELDS, "num_blocks")
        if name in expected and name in found and expected[name] != found[name]
    ]
    there, here = expected.get("embedding"), found.get("embedding")
    if not differences and there and here and len(there) == len(here):
        error = math.dist(there, here) / max(math.hypot(*there), 1e-12)
        if not error <= _SKETCH_TOLERANCE:
            differences.append(f"sampled embedding weights differ by {error:.1%}")
    return differences


def _embedding_sketch(decoder: nn.Module) -> list[float] | None:
    """A few embedding weights of the first tokens, rows apart so that unused ones do not decide."""
    embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    for below_adapter in ("original_module", "base_layer"):
        embedding = getattr(embedding, below_adapter, embedding)
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.is_meta or weight.numel() == 0:
        return None
    rows = torch.linspace(0, min(weight.shape[0], _SKETCH_VOCABULARY) - 1, _SKETCH_ROWS).long()
    columns = torch.linspace(0, weight.shape[1] - 1, _SKETCH_COLUMNS).long()
    weight = weight.detach()[:_SKETCH_VOCABULARY]
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    sample = weight[rows.to(weight.device)][:, columns.to(weight.device)]
    return [round(value, 6) for value in sample.float().flatten().tolist()]
