#!/usr/bin/env python
"""Write a Llama checkpoint as a float32 GGUF, as llama.cpp's converter does.

    python examples/real_models/llama_gguf.py model-folder/ model.gguf

The weights are those of the checkpoint, not rounded, so that logits of llama.cpp and of transformers can be
compared. For other architectures and types take ``convert_hf_to_gguf.py`` of llama.cpp.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{
        f"mlp.{here}_proj.{kind}": f"ffn_{here}.{kind}"
        for here in ("gate", "up", "down")
        for kind in ("weight", "bias")  # biases: a checkpoint with mlp_bias
    },
}


def write_gguf(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Write a ``LlamaForCausalLM`` and its tokenizer (``PreTrainedTokenizerFast``, byte-level BPE or words)."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            for part, count in heads.items():
                if f".{part}." in rest:
                    values = _interleave(values, count)
            name = f"blk.{number}.{_NAMES[rest]}"
        elif name == "lm_head.weight":
            if config.tie_word_embeddings:
                continue
            name = "output.weight"
        else:
            name = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
            }[name]
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: Any, heads: int) -> Any:
    """Rotary pairs are neighbours in llama.cpp's Llama, and halves of a head in transformers'."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    vocabulary = {number: text for text, number in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if merges else "default")
    writer.add_token_list([vocabulary.get(number, f"[unused{number}]") for number in range(size)])
    kinds = [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(size)]
    writer.add_token_types(kinds)
    merges = merges or [f"{vocabulary[0]} {vocabulary[1]}"]  # llama.cpp refuses a vocabulary without any
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)


def main() -> None:
    """The command line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a Llama checkpoint")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    write_gguf(model, AutoTokenizer.from_pretrained(options.model), options.output)


if __name__ == "__main__":
    main()
