"""The tables of docs/performance.md, made from the records that are committed under results/.

    python benchmarks/document.py            print them
    python benchmarks/document.py --write    put them into the page (make performance; make bench does it, too)

A table stands in the page between two marks, ``<!-- table: NAME (make performance) -->`` and ``<!-- end of the
table -->``; ``tables.py`` says what is in it. A test compares the committed page with what the records make.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tables import RESULTS, TABLES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
_REGION = re.compile(
    r"(<!-- table: (?P<name>[\w ]+) \(make performance\) -->\n).*?(<!-- end of the table -->)", re.DOTALL
)


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every table made anew.

    Raises:
        LookupError: the page has a table that ``tables.py`` does not know, or lacks one of its tables.
    """
    names = [match["name"] for match in _REGION.finditer(page)]
    if sorted(names) != sorted(TABLES):
        raise LookupError(f"tables: the page has {sorted(names)}; wanted each once of {sorted(TABLES)}")
    return _REGION.sub(lambda match: f"{match[1]}\n{TABLES[match['name']](results)}\n\n{match[3]}", page)


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
