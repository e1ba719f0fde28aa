"""GGUF control vector: one file per language for llama.cpp, beside the GGUF of the merged model.

``direction.K`` (1-D float32, K ≥ 1) is added to the output of block K, so the shift at boundary k is
``direction.{k-1}``. The output of block 0 is out of reach. As ``llama-cvector-generator`` does, the file holds
every direction from 1 to L-1 (zeros where there is no shift), so that readers see the depth of the model that it
is for.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shifcon_fast.export.engagement import Engagement, attached_logits, check_displacement, probe_tokens
from shifcon_fast.export.llama_cpp import LlamaCpp, read_control_vector
from shifcon_fast.export.shift_vectors import ShiftVectors, shift_vectors
from shifcon_fast.extras import needed_for
from shifcon_fast.storage import replacing
from shifcon_fast.version import __version__

logger = logging.getLogger(__name__)

_TARGET = "--to gguf"
# llama.cpp's names of architectures, where they are not transformers' (gguf.constants.MODEL_ARCH_NAMES).
_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "ministral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    "hunyuan_v1_dense": "hunyuan-dense",
    "olmo3": "olmo2",
    "cohere": "command-r",
    "ministral3": "mistral3",
    "granitemoehybrid": "granitehybrid",
    "llama4_text": "llama4",
}


def export_control_vector(
    model: Any, language: str, folder: str | Path, *, gguf_model: str | Path | None = None
) -> Engagement | None:
    """Write ``<language>.gguf``, for ``llama-server -m model.gguf --control-vector <language>.gguf``.

    The file holds the shift alone. The trained adapter has to be in the model: convert what ``--to merged
    --without-shift`` writes.

    Args:
        model: attached; left as it is.
        language: the one whose prompts the server will be given; it shifts every request.
        folder: made if need be; its other files stay.
        gguf_model: the GGUF that the vector is for. It is run in llama.cpp with and without the vector. None checks
            nothing, which is logged.

    Returns:
        How far the shift moves the logits, and how far what the vector does in llama.cpp is from it; None if it was
        not checked.

    Raises:
        ValueError: nothing to shift; a shift at boundary 0 or 1; a GGUF of another depth, size or architecture; a
            vector that does not engage. MissingExtraError: the extra gguf is not installed, or no library of
            llama.cpp that loads here.
    """
    vectors = shift_vectors(model, language)
    vectors.refuse_below(
        2,
        _TARGET,
        "llama.cpp adds control vectors to the outputs of block 1 and later",
        "Train with forward >= 2; --to peft, --to merged and --to vllm reach boundary 1",
    )
    name = f"{vectors.file_stem}.gguf"
    if gguf_model is None:
        with replacing(folder, name) as staging:
            _write(vectors, staging / name)
        logger.warning(
            "%s: not checked in llama.cpp, which ignores control vectors on some architectures; give the model's "
            "GGUF (--gguf-model) to have it checked",
            Path(folder) / name,
        )
        return None
    with LlamaCpp(gguf_model) as server:
        _check_same_model(vectors, server, gguf_model)
        with replacing(folder, name) as staging:
            _write(vectors, staging / name)
            return _check(model, vectors, server, staging / name, gguf_model)


def _write(vectors: ShiftVectors, path: Path) -> None:
    with needed_for("a GGUF control vector"):
        import gguf
    writer = gguf.GGUFWriter(str(path), "controlvector")
    architecture = _ARCHITECTURES.get(vectors.model_type, vectors.model_type)
    writer.add_string("controlvector.model_hint", architecture)
    writer.add_int32("controlvector.layer_count", vectors.num_blocks - 1)
    writer.add_string("shifcon.version", __version__)
    writer.add_string("shifcon.language", vectors.language)
    writer.add_string("shifcon.pivot", vectors.pivot)
    nothing = torch.zeros(vectors.hidden_size)
    for number in range(1, vectors.num_blocks):
        writer.add_tensor(f"direction.{number}", vectors.at.get(number + 1, nothing).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_same_model(vectors: ShiftVectors, server: LlamaCpp, path: str | Path) -> None:
    wanted = _ARCHITECTURES.get(vectors.model_type, vectors.model_type)
    for what, got, here in (
        ("architecture", server.architecture, wanted),
        ("number of blocks", server.num_blocks, vectors.num_blocks),
        ("hidden size", server.hidden_size, vectors.hidden_size),
    ):
        if got != here:
            raise ValueError(
                f"{path}: its {what} is {got}, the run's model has {here}; wanted the GGUF of this run's model, as "
                "converted from --to merged --without-shift"
            )


def _check(
    model: Any, vectors: ShiftVectors, server: LlamaCpp, path: Path, gguf_model: str | Path
) -> Engagement:
    tokens = probe_tokens(model) % server.vocabulary
    plain = _run(server, tokens)
    server.set_control_vector(read_control_vector(path, vectors.hidden_size))
    shifted = _run(server, tokens)
    found = check_displacement(model, vectors.language, tokens, plain=plain, shifted=shifted, what=_TARGET)
    own = attached_logits(model, tokens, None)
    columns = min(own.shape[-1], plain.shape[-1])
    if (apart := float((plain[..., :columns] - own[..., :columns]).abs().max())) > found.effect / 2:
        logger.warning(
            "%s: without the vector its logits differ from the run's by up to %.3g, where the shift moves them by "
            "%.3g: it is quantised, or the adapter is not merged into it",
            gguf_model,
            apart,
            found.effect,
        )
    return found


def _run(server: LlamaCpp, tokens: Tensor) -> Tensor:
    return torch.stack([server.logits(row) for row in tokens.tolist()])
