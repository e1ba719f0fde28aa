"""The example of a loop of one's own does what it says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import torch

import shifcon_fast as sf
from shifcon_fast.data.instructions import Instruction

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_loop.py"


def test_a_loop_of_ones_own_learns_shifted_and_what_it_saves_loads(
    tiny_checkpoint: Path,
    instructions: list[Instruction],
    parallel_text: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = [
        {"lang": each.language, "prompt": each.turns[0].content, "response": each.turns[1].content}
        for each in instructions
    ]
    aligned = [
        dict(zip(parallel_text, texts, strict=True)) for texts in zip(*parallel_text.values(), strict=True)
    ]
    paths = []
    for name, lines in (("instructions.jsonl", rows), ("parallel.jsonl", aligned)):
        paths.append(tmp_path / name)
        paths[-1].write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    main = runpy.run_path(str(EXAMPLE))["main"]
    losses = main(str(tiny_checkpoint), *map(str, paths), str(tmp_path / "run"), steps=8)
    assert len(losses) == 8
    assert sum(losses[-4:]) < sum(losses[:4])
    model = sf.load(tmp_path / "run")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad(), model.shifcon.use("sw"):
        shifted = model(ids).logits
    assert {sites["shift"] for sites in model.shifcon.engagements.values() if "shift" in sites} == {1}
    with torch.no_grad(), model.shifcon.use("en"):
        assert not torch.allclose(model(ids).logits, shifted)
