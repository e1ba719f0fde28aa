"""Ratios of one record against those of a committed one: has an operator become slower than it was?

    python benchmarks/ratios.py RECORD [COMMITTED]

Compared is how many times as long eager PyTorch takes, measured in turns in one process (``test_ratios.py``), which
depends little on the machine's clock and neighbours. A ratio below ``SHARE`` of the committed one has fallen.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SHARE = 0.6  # of the committed ratio: what a noisy machine of two cores does not fall below
PEER = "eager"


@dataclass(frozen=True)
class Comparison:
    """How many times as long eager takes, now and committed."""

    case: str
    found: float
    committed: float

    @property
    def fallen(self) -> bool:
        return self.found < SHARE * self.committed

    def __str__(self) -> str:
        mark = "FALLEN" if self.fallen else "held"
        return f"{mark:6s} {self.case}: {self.found:.2f} x, committed {self.committed:.2f} x"


def ratios(record: dict[str, Any]) -> dict[str, float]:
    """By case, how many times as long eager takes."""
    rows = [bench["extra_info"] for bench in record["benchmarks"]]
    return {row["case"]: row["times_as_long"][PEER] for row in rows if PEER in row.get("times_as_long", {})}


def processor(record: dict[str, Any]) -> str:
    """The processor's name, as the record has it."""
    return str(record["machine_info"]["cpu"].get("brand_raw", "unknown"))


def committed_for(record: dict[str, Any], name: str, folder: Path = RESULTS) -> tuple[Path, str | None]:
    """The committed record to compare with, and what is to be said of it.

    Of the records ``name`` at the same level of vector instructions, that of the same processor; else any, and the
    second item says that the processors differ.

    Raises:
        LookupError: there is none at that level.
    """
    level = record["machine_info"]["level"]
    found = {
        file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"*/{name}.json"))
    }
    same_level = [file for file, other in found.items() if other["machine_info"]["level"] == level]
    if not same_level:
        raise LookupError(
            f"no record {name} was committed at the level {level!r}; make one with `make bench`"
        )
    here = processor(record)
    for file in same_level:
        if processor(found[file]) == here:
            return file, None
    other = processor(found[same_level[0]])
    return same_level[
        0
    ], f"this is a {here}, the committed ratios are those of a {other} at the level {level}"


def compare(record: dict[str, Any], committed: dict[str, Any]) -> list[Comparison]:
    """Every case of the committed record.

    Raises:
        LookupError: the new record lacks one of them.
    """
    found, wanted = ratios(record), ratios(committed)
    if absent := sorted(wanted.keys() - found.keys()):
        raise LookupError(f"not measured: {', '.join(absent)}")
    return [Comparison(case, found[case], ratio) for case, ratio in wanted.items()]


def main() -> int:
    record = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if len(sys.argv) > 2:
        file, said = Path(sys.argv[2]), None
    else:
        file, said = committed_for(record, Path(sys.argv[1]).stem)
    if said:
        print(said)
    compared = compare(record, json.loads(file.read_text(encoding="utf-8")))
    print(*compared, sep="\n")
    return 1 if any(each.fallen for each in compared) else 0


if __name__ == "__main__":
    sys.exit(main())
