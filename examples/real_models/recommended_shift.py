#!/usr/bin/env python
"""What the recommended shift does to a model that was never trained with it: perplexity by language.

    python examples/real_models/recommended_shift.py MODEL_FOLDER --parallel ntrex128.jsonl --output results/

Estimates the language space on the first sentences of a multi-parallel file, attaches at the area that
``recommend_area`` proposes, and measures each language's own text with and without the shift, on the sentences
after those. It calls public names only, so that any commit can be measured; the result says which.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import shifcon_fast as sf
from shifcon_fast.data import read_parallel
from shifcon_fast.evaluation.perplexity import measure_perplexity


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument("--parallel", type=Path, required=True, help="multi-parallel JSON Lines")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the JSON file")
    parser.add_argument("--name", default="after", help="what to call this version in the file's name")
    parser.add_argument("--languages", default="en,de,fr,sw,tr,hi")
    parser.add_argument("--sentences", type=int, default=100, help="for the space; 60 more are scored")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    found = measure(options)
    path = options.output / f"recommended-{Path(options.model).name}-{options.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The area and, by language, perplexity without and with the shift."""
    languages = options.languages.split(",")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    text = read_parallel(options.parallel, languages=languages)
    count = options.sentences
    space = sf.estimate_space(
        model, tokenizer, {code: each[:count] for code, each in text.items()}, pivot=languages[0]
    )
    area = sf.recommend_area(space)
    perplexity: dict[str, dict[str, float]] = {}
    with sf.attach(model, space, forward=area.forward, backward=area.backward) as handle:
        for code in languages:
            perplexity[code] = {
                name: measure_perplexity(
                    model, tokenizer, text[code][count : count + 60], language=code, handle=attached
                ).value
                for name, attached in (("unshifted", None), ("shifted", handle))
            }
    return {
        "kind": "recommended_shift",
        "model": Path(options.model).name,
        "data": options.parallel.name,
        "sentences": {"space": count, "scored": 60},
        "area": [area.forward, area.backward],
        "reason": area.reason,
        "perplexity": perplexity,
        "dtype": options.dtype,
        "machine": platform.machine(),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "shifcon_fast": sf.__version__,
        },
    }


def _commit() -> str:
    here = Path(sf.__file__).parent
    found = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "not a checkout"


if __name__ == "__main__":
    main()
