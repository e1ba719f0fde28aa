"""Shapes of models and of the steps that are measured on them; nothing is imported to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
