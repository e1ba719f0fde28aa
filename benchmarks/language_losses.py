"""What losses by language add to a training step: python -P benchmarks/language_losses.py

A random model of SmolLM2-135M's sizes with LoRA, 4 rows of 128 tokens, float32: seconds of forward and backward,
and of what ``language_losses`` adds to it. Prints JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from shifcon_fast.training.losses.language_losses import LanguageLosses, token_losses

ROWS, TOKENS, REPEATS = 4, 128, 5


def seconds(run: Callable[[], Any]) -> list[float]:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(round(time.perf_counter() - start, 4))
    return times


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear")).train()
    ids = torch.randint(0, config.vocab_size, (ROWS, TOKENS))
    losses = LanguageLosses(("en", "sw", "de", "tr"))
    language_ids = torch.arange(ROWS)

    def step() -> torch.Tensor:
        output = model(ids, labels=ids)
        output.loss.backward()
        model.zero_grad()
        return output.logits.detach()

    logits = step()
    found = {
        "forward_and_backward": seconds(step),
        "language_losses": seconds(lambda: losses.add(losses.rows(token_losses(logits, ids), language_ids))),
    }
    medians = {name: statistics.median(times) for name, times in found.items()}
    share = medians["language_losses"] / medians["forward_and_backward"]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(
        json.dumps(
            {
                "seconds": found,
                "share": round(share, 4),
                "threads": torch.get_num_threads(),
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
