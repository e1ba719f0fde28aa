"""Steering vectors for vLLM, read back by hotwire's own loader; the engine itself needs a GPU and is not run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hotwire._state import SteerState, parse_spec
from torch import Tensor

from shifcon_fast.export.vllm import export_vllm
from shifcon_fast.modeling.architectures import locate_decoder


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_hotwires_loader_and_its_sum_give_the_shifted_logits(
    architecture: str,
    attached: Callable[..., Any],
    oracle: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    model = attached(architecture)
    found = export_vllm(model, "zh/Hans:x", tmp_path)
    assert found.effect > 0.5
    state = SteerState(4, 32, 64, torch.device("cpu"), torch.float32, n_slots=4)
    state.load_store(str(tmp_path))
    arguments = json.loads((tmp_path / "zh%2FHans%3Ax.json").read_text())
    steps = parse_spec(arguments["hotwire"])
    assert steps is not None
    plain = copy.deepcopy(model)
    plain.shifcon.detach()
    for step in steps:
        slot = state.slot_for(step["id"], step["layer"], step["scale"])
        added = state.bank.scales[slot] * state.bank.bank[slot]

        def steer(module: Any, args: Any, output: Any, added: Tensor = added) -> Any:
            return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

        locate_decoder(plain).blocks[step["layer"]].register_forward_hook(steer)
    with torch.no_grad():
        oracle(model, "zh/Hans:x", tokens).check(plain(input_ids=tokens).logits)


def test_the_file_is_a_plain_tensor_and_names_lead_nowhere(
    attached: Callable[..., Any], tmp_path: Path
) -> None:
    model = attached("llama")
    export_vllm(model, "zh/Hans:x", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"zh%2FHans%3Ax.json", "zh%2FHans%3Ax.pt"}
    rows = torch.load(tmp_path / "out" / "zh%2FHans%3Ax.pt", weights_only=True)
    assert type(rows) is Tensor
    assert rows.dtype == torch.float32
    assert rows.shape == (4, 32)
    assert rows.any(dim=1).tolist() == [False, True, True, False]


def test_boundary_0_is_refused(attached: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--to vllm: the run shifts at boundary 0; wanted 1 or later"):
        export_vllm(attached("llama", forward=0), "sw", tmp_path)
    assert list(tmp_path.iterdir()) == []
