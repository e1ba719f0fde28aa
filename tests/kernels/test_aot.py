"""Every kernel variant compiled for four GPUs, none of which is needed, against the committed table.

``make aot`` prints the table. After a deliberate change:
``python scripts/aot.py --json tests/kernels/aot_table.json``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("aot_table.json")
Row = dict[str, Any]

# One number per row, token, language or problem: there is nothing beside it that a wider load could fetch as well.
ONE_PER_ROW = {
    "rstd_ptr", "index_ptr", "mask_ptr", "count_ptr", "factor_ptr", "bias_ptr", "along_ptr", "squares_ptr",
    "inverse_ptr", "inverse_a_ptr", "inverse_b_ptr", "row_factor_ptr",
    "row_max_ptr", "row_log_ptr", "column_max_ptr", "column_log_ptr",
}  # fmt: skip
# The same under names that elsewhere mean a row: ∂L/∂loss of a problem, the weights of a weighted sum of rows.
ONE_PER_ROW_IN = {
    ("tile_weights", "grad_ptr"),
    ("whole_weights", "grad_ptr"),
    ("weighted_sums", "weight_ptr"),
    (
        "backward_persistent",
        "weight_ptr",
    ),  # once for all the rows of a program, which has more threads than others
}
# Tiles with fewer than 16 bytes a thread: a weight of 256 numbers, a matrix of 16 × 16.
TOO_SMALL = ("d=256,", "N=16,")
# The large results, y, h and the gradients of hidden states, leave 128 bits at a time as well.
STORES_ROWS = {
    "forward_rows", "forward_looped", "backward_rows", "backward_looped", "backward_persistent", "backward"
}  # fmt: skip
ROWS = {"y_ptr", "h_ptr", "grad_x_ptr", "grad_h_ptr"}


Rows = dict[tuple[str, str], Row]


def by_variant(rows: list[Row]) -> Rows:
    return {(row["kernel"], row["case"]): row for row in rows}


def waits_for_each_load(variant: tuple[str, str], row: Row) -> bool:
    """Whether a loop whose loads should be under way, through shared memory, holds none of them there."""
    kernel, case = variant
    sizes = {name: int(size) for name, size in re.findall(r"\b([Nd])=(\d+)", case)}
    if kernel in {"whole_loss", "whole_weights"}:
        count = sizes["N"]
        held = 4 * count * (count if kernel == "whole_loss" else min(count, 32))
    elif kernel == "backward_persistent" and sizes["d"] > 1024:
        held = 3 * sizes["d"] * (4 if "norm fp32" in case else 2)
    elif kernel == "partial_sums":
        held = 8 * 512 * (4 if "pool fp32" in case else 2)
    else:
        return False
    return row["target"] != "gfx942" and row["shared"] < held  # there they are under way to registers


def narrow_loads(variant: tuple[str, str], row: Row) -> list[str]:
    """Pointers that are read in pieces of less than 128 bits without a reason."""
    kernel, case = variant
    if any(size in case for size in TOO_SMALL):
        return []
    pointers = [access.removeprefix("load ") for access in row["narrow"] if access.startswith("load ")]
    # AMD's assembler loses the source line of a few loads; the other targets show which they are.
    known = ONE_PER_ROW | ({"unknown"} if row["target"] == "gfx942" else set())
    return [
        pointer for pointer in pointers if pointer not in known and (kernel, pointer) not in ONE_PER_ROW_IN
    ]


@pytest.mark.slow("compiles every kernel variant for four GPUs")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_what_the_compilers_make_of_every_variant(target: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    command = [sys.executable, str(REPOSITORY / "scripts/aot.py"), "--target", target, "--json", str(path)]
    shared = tmp_path / "cache"
    environment = os.environ | {"TRITON_CACHE_DIR": str(shared)}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert not shared.exists(), "the cache that all clones share names the files of other clones"
    compiled = by_variant(json.loads(path.read_text(encoding="utf-8")))
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    committed = by_variant([row for row in table if row["target"] == target])
    assert compiled.keys() == committed.keys(), "the launchers launch other variants than the table lists"
    assert len(compiled) > 100
    assert [variant for variant, row in compiled.items() if row["spills"]] == []
    assert [variant for variant, row in compiled.items() if waits_for_each_load(variant, row)] == []
    for what in ("registers", "shared"):
        above = {
            variant: f"{row[what]} > {committed[variant][what]}"
            for variant, row in compiled.items()
            if row[what] > committed[variant][what]
        }
        assert above == {}, what
    narrow = {variant: narrow_loads(variant, row) for variant, row in compiled.items()}
    assert {variant: pointers for variant, pointers in narrow.items() if pointers} == {}
    for (kernel, case), row in compiled.items():
        if kernel in STORES_ROWS and not any(size in case for size in TOO_SMALL):
            stores = {access.split()[-1] for access in row["narrow"] if access.startswith("store")}
            assert row["stores"].get("128", 0) > 0, (kernel, case)
            assert not stores & ROWS, (kernel, case)
