"""The tables of docs/performance.md, made from the records that are committed under results/.

    python benchmarks/document.py            print them
    python benchmarks/document.py --write    put them into the page (make performance; make bench does it, too)

A table stands between two marks of the page (``scripts/page_regions.py``); ``tables.py`` says what is in it. A test
compares the committed page with what the records make.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import page_regions
from tables import RESULTS, TABLES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
COMMAND = "make performance"


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every table made anew.

    Raises:
        LookupError: the page has a table that ``tables.py`` does not know, or lacks one of its tables.
        ValueError: a table has no end.
    """
    names = page_regions.region_names(page, COMMAND)
    if sorted(names) != sorted(TABLES):
        raise LookupError(f"tables: the page has {sorted(names)}; wanted each once of {sorted(TABLES)}")
    return page_regions.filled(page, COMMAND, {name: TABLES[name](results) for name in names})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/performance.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for name, make in TABLES.items():
        print(f"{name}\n\n{make(RESULTS)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
