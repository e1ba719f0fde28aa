#!/usr/bin/env python
"""Make GGUF files of float32 weights, whose logits in llama.cpp can be compared with transformers' own.

    python examples/real_models/float32_gguf.py checkpoint/ model.gguf      # a Llama checkpoint
    python examples/real_models/float32_gguf.py quantised.gguf model.gguf   # of any architecture

No weight is rounded: a checkpoint's are written as they are, and a quantised file's as they are unpacked, which
is what transformers does with them too. Models to serve are made with ``convert_hf_to_gguf.py`` of llama.cpp.
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


def from_checkpoint(model: Any, tokenizer: Any, path: str | Path) -> None:
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


def from_gguf(source: str | Path, path: str | Path) -> None:
    """Write a GGUF file again with every tensor in float32; what it says of the model and the tokenizer is kept."""
    file = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(path), file.fields["general.architecture"].contents())
    for name, field in file.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.quantization_version"):
            continue
        if name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in file.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of a Llama checkpoint, or a GGUF file")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    options = parser.parse_args()
    if options.source.is_file():
        from_gguf(options.source, options.output)
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.source)
    from_checkpoint(model, AutoTokenizer.from_pretrained(options.source), options.output)


if __name__ == "__main__":
    main()
