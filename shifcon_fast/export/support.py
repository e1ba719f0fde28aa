"""Which exports a run can take, by its architecture: what the exporters find, written down for who has no model.

``docs/serving.md`` has the same table. The tests hold both to what :mod:`.output_bias` and :mod:`.merged` find.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shifcon_fast.space.language_shift import LanguageShift

BIAS_IN_CHECKPOINT = frozenset(
    (
        *("llama", "granite", "smollm3", "falcon", "gpt_neox"),
        *("gpt2", "bloom", "opt", "xglm", "starcoder2"),
    )
)
"""The configuration gives the layer that ends a block a bias."""
BIAS_IN_ADAPTER = BIAS_IN_CHECKPOINT | frozenset(
    (
        *("mistral", "ministral", "ministral3", "qwen2", "qwen3"),
        *("qwen3_5_text", "phi3", "gemma", "apertus", "hunyuan_v1_dense"),
        *("lfm2", "llama4_text", "granitemoehybrid", "cohere", "cohere2"),
        *("stablelm",),
    )
)
"""A constant on that layer's output is one on the block's: no norm and no choice of experts comes after it."""
_NOT_IN_PEFT = ("use_dora", "target_parameters", "layer_replication")
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out"}


def supported_targets(
    model_type: str, shift: LanguageShift | None, adapter: Mapping[str, Any]
) -> tuple[str, ...]:
    """The targets of ``shifcon export`` that take a run's shift; an unknown architecture is not promised a bias.

    Args:
        model_type: ``config.model_type`` of the decoder.
        shift: the run's; None, or one of alpha 0, has nothing to export, and a map is no vector.
        adapter: its ``adapter_config.json``.
    """
    if shift is None or not shift.alpha or shift.is_map or shift.moves_pivot:
        return ()
    first = min(shift.blocks)
    found = []
    if first >= 1 and model_type in BIAS_IN_ADAPTER and _takes_bias(adapter):
        found.append("peft")
    if first >= 1 and model_type in BIAS_IN_CHECKPOINT:
        found.append("merged")
    if first >= 2:
        found.append("gguf")
    if first >= 1:
        found.append("vllm")
    return tuple(found)


def _takes_bias(adapter: Mapping[str, Any]) -> bool:
    targets = adapter.get("target_modules") or ()
    named = {str(each).rpartition(".")[2] for each in ([targets] if isinstance(targets, str) else targets)}
    plain = not any(adapter.get(name) for name in _NOT_IN_PEFT) and not named & _EMBEDDINGS
    return adapter.get("peft_type") == "LORA" and plain
