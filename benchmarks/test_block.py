"""Decoder blocks of SmolLM2's shape: attached against transformers' own, where a hook adds the shift."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

import shifcon_fast as sf

sys.path.insert(0, str(Path(__file__).resolve().parent / "step"))
SIZES = importlib.import_module("shapes").SIZES
make_space = importlib.import_module("variants").make_space
BLOCKS, AREA = 3, (1, 2)


def decoder(device: torch.device, smoke: bool) -> Any:
    """Three blocks, random weights, of the dtype that trains fastest everywhere: float32 on the CPU."""
    size = SIZES["tiny" if smoke else "smollm2"]
    config = AutoConfig.for_model(size.model_type, **{**size.config, "num_hidden_layers": BLOCKS})
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return AutoModel.from_config(config, dtype=dtype).to(device).requires_grad_(False)


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_blocks(direction: str, take_turns: Any, device: torch.device, smoke: bool) -> None:
    plain, attached = decoder(device, smoke), decoder(device, smoke)
    space = make_space(attached)
    sf.attach(attached, space, *AREA)
    _shift_by_hooks(plain, space)
    rows, tokens = (2, 8) if smoke else (4, 128)
    width = plain.config.hidden_size
    embedded = torch.randn(rows, tokens, width, device=device, dtype=plain.dtype).requires_grad_()
    ids = torch.ones(rows, dtype=torch.long, device=device)
    upper = torch.randn_like(embedded)
    inputs = {"inputs_embeds": embedded, "use_cache": False}

    def call(model: Any, **further: Any) -> Callable[[], Tensor]:
        def once() -> Tensor:
            result = model(**inputs, **further).last_hidden_state
            if direction == "forward":
                return result
            return torch.autograd.grad(result, embedded, upper)[0]

        return once

    ours, theirs = call(attached, language_ids=ids), call(plain)
    with torch.set_grad_enabled(direction != "forward"):
        difference = (ours() - theirs()).norm() / theirs().norm()
        assert difference < (2e-2 if device.type == "cuda" else 1e-4), f"off by {difference:.1e}"
        peers = {"ours": [ours], "transformers, shift by hooks": [theirs]}
        case = f"{BLOCKS} blocks of SmolLM2's shape, {direction}, {rows}x{tokens}"
        take_turns(peers, case=case, difference=float(difference))


def _shift_by_hooks(model: Any, space: sf.LanguageSpace) -> None:
    """The shift of language 1 at the inputs of blocks f and b, as a hook writes it."""
    toward, back = (space.shift_vectors(k)[1].to(model.device, model.dtype) for k in AREA)
    for block, vector in ((AREA[0], toward), (AREA[1], -back)):

        def add(module: Any, arguments: tuple[Any, ...], vector: Tensor = vector) -> tuple[Any, ...]:
            return (arguments[0] + vector, *arguments[1:])

        model.layers[block].register_forward_pre_hook(add)
