#!/usr/bin/env python
"""What leaving out tokens of massive norm costs: a contrastive pass, forward and backward, with and without it.

    python -P benchmarks/content_tokens.py MODEL_FOLDER --output content_tokens.json

Rows of the given length go through the model once a round with each, in turns, so that noise meets both alike: the
median of the rounds' ratios, with the quartiles. On a machine that other programs use, the ratio's noise is larger
than what is looked for; so the rule is also timed alone, at as many boundaries, against the fastest pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.content import ordinary_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    blocks = locate_decoder(model).num_boundaries
    area = range(blocks // 3, 2 * blocks // 3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 30_000, (options.rows, options.tokens), generator=generator)
    mask = torch.ones_like(ids)
    pool = mask.bool()
    pool[:, 0] = False

    def step(keep_massive: bool) -> float:
        start = time.perf_counter()
        found = boundary_representations(model, ids, mask, pool, area, keep_massive=keep_massive)
        found.square().sum().backward()
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    def rule() -> float:
        start = time.perf_counter()
        for _ in area:
            ordinary_tokens(hidden, pool)
        return time.perf_counter() - start

    hidden = torch.randn(*ids.shape, locate_decoder(model).hidden_size, dtype=getattr(torch, options.dtype))
    step(True), step(False)
    ratios, passes = [], []
    for index in range(options.rounds):
        first = bool(index % 2)
        seconds = {each: step(each) for each in (first, not first)}
        ratios.append(seconds[False] / seconds[True])
        passes.append(seconds[True])
    share = min(rule() for _ in range(20)) / min(passes)
    low, median, high = statistics.quantiles(ratios, n=4)
    found = {
        "model": Path(options.model).name,
        "what": "contrastive pass, forward and backward: massive tokens left out / kept, ratio of seconds",
        "area": [area.start, area.stop],
        "rows": options.rows,
        "tokens": options.tokens,
        "dtype": options.dtype,
        "median": round(median, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "rule_alone": {"share_of_a_pass": round(share, 5), "fastest_pass_s": round(min(passes), 3)},
        "ratios": [round(each, 4) for each in ratios],
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
