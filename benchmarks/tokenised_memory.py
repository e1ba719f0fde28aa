"""Bytes a token that tokenised instructions keep in memory, and the time tokenising takes, by kind of data set.

    python -P benchmarks/tokenised_memory.py [--instructions 20000]

Python's own allocations by tracemalloc, Arrow's by its memory pool. Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import datasets
import pyarrow as pa
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from shifcon_fast.data.instructions import Instruction
from shifcon_fast.training.batches.instruction_data import InstructionDataset

MAX_LENGTH = 512


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def measure(make: Callable[[], Any]) -> dict[str, float]:
    gc.collect()
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    start = time.perf_counter()
    data = make()
    seconds = time.perf_counter() - start
    gc.collect()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held += pa.total_allocated_bytes() - arrow
    tokens = sum(len(row["input_ids"]) for row in data)
    return {
        "tokens": tokens,
        "bytes_per_token": round(held / tokens, 1),
        "python_peak_bytes_per_token": round(peak / tokens, 1),
        "seconds_with_tracing": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--instructions", type=int, default=5000)
    count = parser.parse_args().instructions
    draw = random.Random(0)
    words = [f"w{index}" for index in range(30_000)]
    tokenizer = make_tokenizer(words)
    rows = [
        {
            "lang": "sw",
            "prompt": " ".join(draw.choices(words, k=120)),
            "response": " ".join(draw.choices(words, k=80)),
        }
        for _ in range(count)
    ]
    instructions = [Instruction.single(row["lang"], row["prompt"], row["response"]) for row in rows]

    def in_memory() -> Any:
        return InstructionDataset(instructions, tokenizer, {"sw": 0}.__getitem__, max_length=MAX_LENGTH)

    found = {"list of instructions": measure(in_memory)}
    try:
        from shifcon_fast.training.batches.instruction_data import ExampleEncoder
        from shifcon_fast.training.batches.prepared_data import prepare
    except ImportError:  # before data sets were mapped
        pass
    else:
        encoder = ExampleEncoder(tokenizer, {"sw": 0}.__getitem__, max_length=MAX_LENGTH)
        table = datasets.Dataset.from_list(rows)
        found["datasets.Dataset in memory"] = measure(lambda: prepare(table, encoder))
        with tempfile.TemporaryDirectory() as folder:
            table.save_to_disk(folder)
            on_disk = datasets.load_from_disk(folder)
            found["datasets.Dataset on disk"] = measure(lambda: prepare(on_disk, encoder))
    versions = {
        "python": platform.python_version(),
        "datasets": datasets.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"instructions": count, "found": found, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
