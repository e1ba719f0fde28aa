"""Runs in a process of its own, without ShifCon: what stock transformers and PEFT compute from exported folders.

    python stock.py question.json answers.safetensors

The question: ``tokens``, and under ``models`` names of answers with a ``base`` folder, the ``adapters`` to load by
name, and which of them each row takes (``rows``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

assert "shifcon_fast" not in sys.modules
sys.modules["shifcon_fast"] = None  # type: ignore[assignment] - importing it is an error from here on


@torch.no_grad()
def main(question: Path, answers: Path) -> None:
    asked = json.loads(question.read_text())
    tokens = torch.tensor(asked["tokens"])
    logits = {}
    for name, model in asked["models"].items():
        found = AutoModelForCausalLM.from_pretrained(model["base"], dtype=torch.float32)
        assert not any("ShifCon" in type(module).__name__ for module in found.modules())
        adapters = dict(model.get("adapters", {}))
        settings = {}
        for number, (adapter, folder) in enumerate(adapters.items()):
            if number == 0:
                found = PeftModel.from_pretrained(found, folder, adapter_name=adapter)
            else:
                found.load_adapter(folder, adapter_name=adapter)
        if rows := model.get("rows"):
            settings["adapter_names"] = rows
        logits[name] = found.eval()(input_ids=tokens, **settings).logits.contiguous()
    save_file(logits, answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
