"""Compile csrc/cuda for GPUs that need not be here, and tell what each kernel takes on them.

    python scripts/cuda_resources.py                                          print the table
    python scripts/cuda_resources.py --json tests/native/cuda_resources.json  write it

A row tells, per kernel and architecture, the registers, the bytes of spills (stores plus loads), of stack and of
static shared memory, as ptxas reports them. Shared memory that a launch asks for is not ptxas's to know.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("kernel", "architecture", "registers", "spills", "stack", "shared")
Row = dict[str, Any]

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)a?'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def ninja_build() -> ModuleType:
    """csrc/ninja_build.py, which holds the flags that the library is built with."""
    if "ninja_build" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ninja_build", ROOT / "csrc/ninja_build.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["ninja_build"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["ninja_build"])
    return sys.modules["ninja_build"]


def parse(report: str) -> list[Row]:
    """The rows in what ``ptxas -v`` printed.

    Raises:
        RuntimeError: a kernel without its numbers: ptxas prints something else than it did.
    """
    rows: list[Row] = []
    # What precedes the first kernel is about none; each kernel's lines follow its name.
    pieces = re.split(r"(?=Compiling entry function)", report)[1:]
    for piece in pieces:
        entry, frame, used = _ENTRY.search(piece), _FRAME.search(piece), _USED.search(piece)
        if entry is None or frame is None or used is None:
            raise RuntimeError(f"ptxas reported in words that are not known here: {piece[:300]!r}")
        shared = _SHARED.search(piece)
        rows.append(
            {
                "kernel": _readable(entry[1]),
                "architecture": entry[2],
                "registers": int(used[1]),
                "spills": int(frame[2]) + int(frame[3]),
                "stack": int(frame[1]),
                "shared": int(shared[1]) if shared else 0,
            }
        )
    return rows


def _readable(symbol: str) -> str:
    """``contract_mma<BFloat16>`` of its mangled name; an anonymous namespace's holds a hash of the source."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|shifcon::|^void |\((int|bool)\)", "", text)
    return re.sub(r"\(\w+\)$", "", text)


def compile_all(folder: Path) -> tuple[list[Row], Path]:
    """Every kernel of every source for every architecture, and the library of them in ``folder``.

    Raises:
        ninja_build.BuildError: there is no nvcc, or a source does not compile.
    """
    build = ninja_build()
    library = folder / "cuda.abi3.so"
    # One architecture after the other, or their reports get mixed up.
    said = build.build_cuda(build.find_toolchain(), library, folder / "objects", extra=["-Xptxas=-v"])
    return sorted(parse(said), key=lambda row: (row["kernel"], row["architecture"])), library


def main() -> None:
    parser = argparse.ArgumentParser(description="What every CUDA kernel takes, without a GPU.")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the table there instead of printing it"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = compile_all(Path(folder))
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
        return
    sys.stdout.write("\t".join(COLUMNS) + "\n")
    for row in rows:
        sys.stdout.write("\t".join(str(row[column]) for column in COLUMNS) + "\n")


if __name__ == "__main__":
    main()
