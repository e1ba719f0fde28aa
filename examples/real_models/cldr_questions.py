#!/usr/bin/env python
"""Write the CLDR questions, which measure "knows it in English, not in Swahili", as JSON Lines.

    python examples/real_models/cldr_questions.py --languages en,de,sw --split dev --output questions.jsonl
    shifcon evaluate --model ... --questions questions.jsonl --output results/

    python examples/real_models/cldr_questions.py --languages en --instructions --output train.jsonl

The second form writes the facts of the train territories as instructions (prompt, response) for `shifcon train`.
What is asked, and how the choices are found, is in shifcon_fast/data/cldr.py. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from shifcon_fast.data.cldr import KINDS, LANGUAGES, SPLITS, cldr_instructions, cldr_rows
from shifcon_fast.data.errors import DataError


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--languages", required=True, help=f"comma-separated, of {','.join(LANGUAGES)}")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated; all unless given")
    parser.add_argument(
        "--split", choices=[*SPLITS, "all"], help="all unless given; train with --instructions"
    )
    parser.add_argument("--instructions", action="store_true", help="prompts and responses, not questions")
    parser.add_argument("--output", type=Path, required=True, help="the JSON Lines file")
    options = parser.parse_args()
    languages, kinds = options.languages.split(","), options.kinds.split(",")
    split = options.split or ("train" if options.instructions else "all")
    make = cldr_instructions if options.instructions else cldr_rows
    try:
        rows = make(languages, split=None if split == "all" else split, kinds=kinds)
    except DataError as error:
        sys.exit(f"cldr_questions.py: {error}")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    options.output.write_text("".join(lines), encoding="utf-8")
    print(f"{options.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
