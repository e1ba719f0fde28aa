"""vLLM: steering vectors in the format of the plugin hotwire-vllm, one file per language, chosen by each request.

The file is a (L, d) float32 tensor whose row i is added to the output of layer i, so the shift at boundary k is row
k-1. hotwire reads ``.pt`` files with ``torch.load(weights_only=True)``; a plain tensor is all that this writes,
and all that a reader has to accept. It is the one file of this package that is not safetensors, since the plugin
takes no other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shifcon_fast.export.engagement import Engagement, check_engagement
from shifcon_fast.export.plain_copy import plain_copy
from shifcon_fast.export.shift_vectors import ShiftVectors, shift_vectors
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.storage import replacing, write_json

_TARGET = "--to vllm"


def export_vllm(model: Any, language: str, folder: str | Path) -> Engagement:
    """Write ``<language>.pt`` for ``HOTWIRE_VECTORS``, and ``<language>.json`` with a request's ``vllm_xargs``.

    The file holds the shift alone. The trained adapter has to be in the model that vLLM serves: what ``--to merged
    --without-shift`` writes.

    Args:
        model: attached; left as it is.
        language: the one whose requests name the vector.
        folder: made if need be; its other files stay.

    Returns:
        How far the shift moves the logits, and how far what the file says does: checked by reading it as hotwire
        does and adding its rows behind the layers that the request names. vLLM itself is not run.

    Raises:
        ValueError: nothing to shift; a shift at boundary 0; a file that does not engage.
    """
    vectors = shift_vectors(model, language)
    vectors.refuse_below(
        1,
        _TARGET,
        "hotwire adds vectors to the outputs of layers",
        "No server format reaches boundary 0: train with forward >= 1, or serve with shifcon_fast.load",
    )
    stem = vectors.file_stem
    card, tensor = f"{stem}.json", f"{stem}.pt"
    copied = plain_copy(model)
    with replacing(folder, card, (tensor,)) as staging:
        torch.save(_rows(vectors), staging / tensor)
        steps = [{"id": stem, "layer": boundary - 1, "scale": 1.0} for boundary in sorted(vectors.at)]
        write_json(staging / card, {"hotwire": json.dumps(steps)})

        def exported(tokens: Tensor) -> Tensor:
            request = json.loads(json.loads((staging / card).read_text(encoding="utf-8"))["hotwire"])
            _steer(copied, torch.load(staging / tensor, map_location="cpu", weights_only=True), request)
            return copied(input_ids=tokens.to(copied.get_input_embeddings().weight.device)).logits

        return check_engagement(model, vectors.language, exported, _TARGET)


def _rows(vectors: ShiftVectors) -> Tensor:
    rows = torch.zeros(vectors.num_blocks, vectors.hidden_size)
    for boundary, vector in vectors.at.items():
        rows[boundary - 1] = vector
    return rows


def _steer(model: nn.Module, rows: Tensor, request: list[dict[str, Any]]) -> None:
    """Add what hotwire adds: ``scale * rows[layer]`` to the hidden states that a layer returns."""
    blocks = locate_decoder(model).blocks
    for step in request:
        vector = step["scale"] * rows[step["layer"]]

        def add(module: nn.Module, args: Any, output: Any, vector: Tensor = vector) -> Any:
            hidden, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            hidden = (hidden.float() + vector.to(hidden.device)).to(hidden.dtype)
            return hidden if rest is None else (hidden, *rest)

        blocks[step["layer"]].register_forward_hook(add)
