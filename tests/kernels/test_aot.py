"""Every kernel variant compiled for four GPUs, none of which is needed, against the committed table.

``make aot`` prints the table. After a deliberate change:
``python scripts/aot.py --json tests/kernels/aot_table.json``.
"""

from __future__ import annotations

import json
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


def key(row: Row) -> tuple[str, str, str]:
    return row["target"], row["kernel"], row["case"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Row]:
    path = tmp_path_factory.mktemp("aot") / "table.json"
    command = [sys.executable, str(REPOSITORY / "scripts/aot.py"), "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return {key(row): row for row in json.loads(path.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def committed() -> dict[tuple[str, str, str], Row]:
    return {key(row): row for row in json.loads(TABLE.read_text(encoding="utf-8"))}


def test_the_table_lists_what_the_launchers_launch(
    compiled: dict[tuple[str, str, str], Row], committed: dict[tuple[str, str, str], Row]
) -> None:
    assert compiled.keys() == committed.keys()
    assert {target for target, _, _ in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_nothing_spills(compiled: dict[tuple[str, str, str], Row]) -> None:
    assert [where for where, row in compiled.items() if row["spills"]] == []


def test_registers_and_shared_memory_stay_under_their_ceilings(
    compiled: dict[tuple[str, str, str], Row], committed: dict[tuple[str, str, str], Row]
) -> None:
    for what in ("registers", "shared"):
        above = {
            where: (row[what], committed[where][what])
            for where, row in compiled.items()
            if row[what] > committed[where][what]
        }
        assert above == {}, what


def test_loads_have_128_bits_where_alignment_allows(compiled: dict[tuple[str, str, str], Row]) -> None:
    narrow = []
    for (target, kernel, case), row in compiled.items():
        for access in row["narrow"]:
            kind, pointer = access.split(maxsplit=1)
            if kind == "store" or pointer in ONE_PER_ROW or (kernel, pointer) in ONE_PER_ROW_IN:
                continue
            if any(size in case for size in TOO_SMALL):
                continue
            # AMD's assembler loses the source line of a few loads; the other targets show which they are.
            if not (target == "gfx942" and pointer == "unknown"):
                narrow.append((target, kernel, case, access))
    assert narrow == []


def test_rows_are_stored_128_bits_at_a_time(compiled: dict[tuple[str, str, str], Row]) -> None:
    """The large results: y, h and the gradients of hidden states and of pooled rows."""
    kernels = {
        "forward_rows",
        "forward_looped",
        "backward_rows",
        "backward_looped",
        "backward_persistent",
        "backward",
    }
    rows = {"y_ptr", "h_ptr", "grad_x_ptr", "grad_h_ptr"}
    for (_, kernel, case), row in compiled.items():
        if kernel in kernels and not any(size in case for size in TOO_SMALL):
            assert row["stores"].get("128", 0) > 0, (kernel, case)
            assert (
                not {access.split()[-1] for access in row["narrow"] if access.startswith("store")} & rows
            ), case
