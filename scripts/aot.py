"""Compile every Triton kernel variant for GPUs that need not be here, and tell what the compilers made of it.

    python scripts/aot.py                         print the table
    python scripts/aot.py --json table.json       write it
    python scripts/aot.py --target sm_90          one target only

The launchers themselves run, on tensors without storage: what is compiled is what they would launch, with the same
tile sizes, warps and specialisation. Only the launch is left out. A row tells registers and spills per thread,
shared memory per program, the width in bits of every access to global memory, and which pointers are read or
written in pieces of less than 128 bits. Where a source line is known from the assembly, so is its pointer.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import stand_in_driver

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
Case = tuple[str, Callable[[], object]]


def cases() -> Iterator[Case]:
    """Every path of every launcher: dtypes, tile sizes, optional inputs, styles, gradients."""
    import torch
    from shifcon_fast.kernels import add_shift_rms_norm, contrastive_similarity, info_nce, masked_mean_pool

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

    def norm(
        dtype: torch.dtype,
        hidden: int,
        *,
        weight: torch.dtype | None = None,
        residual: bool = True,
        shift: bool = True,
        index: torch.dtype = torch.int64,
        per_token: bool = False,
        style: str = "llama",
        upper: bool = True,
        train: str = "x",
    ) -> Case:
        def call() -> None:
            x = new(8, 1024, hidden, dtype=dtype)
            w = new(hidden, dtype=weight or dtype)
            table = new(64, hidden) if shift else None
            rows = (8, 1024) if per_token else (8,)
            ids = new(*rows, dtype=index) if shift else None
            _, h, rstd = add_shift_rms_norm.forward(x, w, x if residual else None, table, ids, 1e-6, style)
            add_shift_rms_norm.backward(
                x, x if upper else None, x if h is None else h, w, rstd, ids, 64, style,
                "x" in train, "w" in train, "s" in train and shift,
            )  # fmt: skip

        extras = [f"d={hidden}", style, f"train {train}"]
        extras += [f"weight {names[weight]}"] if weight else []
        extras += [
            name for name, used in (("residual", residual), ("shift", shift), ("grad_h", upper)) if used
        ]
        extras += ["int32 index"] if index == torch.int32 else []
        extras += ["index per token"] if per_token else []
        return f"norm {names[dtype]} " + ", ".join(extras), call

    every = (256, 1024, 2048, 4096, 8192, 16384, 65536)
    for dtype, sizes in ((torch.bfloat16, every), (torch.float32, every), (torch.float16, (4096,))):
        for hidden in sizes:
            yield norm(dtype, hidden)
            yield norm(dtype, hidden, train="xw")
    yield norm(torch.bfloat16, 4096, train="ws")
    yield norm(torch.bfloat16, 16384, train="ws")
    for hidden in (3072, 5120):
        yield norm(torch.bfloat16, hidden, weight=torch.float32, train="xws")
    for style in ("gemma", "olmo"):
        yield norm(torch.bfloat16, 4096, style=style)
        yield norm(torch.bfloat16, 4096, style=style, train="xw")
    yield norm(torch.bfloat16, 4096, weight=torch.float32, residual=False)
    yield norm(torch.bfloat16, 4096, shift=False, upper=False)
    yield norm(torch.bfloat16, 4096, residual=False, shift=False)
    yield norm(torch.bfloat16, 4096, index=torch.int32, train="xs")
    yield norm(torch.bfloat16, 4096, per_token=True, train="xs")

    def pool(dtype: torch.dtype, mask: torch.dtype, normalize: bool) -> Case:
        def call() -> None:
            h, m = new(8, 512, 4096, dtype=dtype), new(8, 512, dtype=mask)
            pooled, factor = masked_mean_pool.forward(h, m, normalize)
            masked_mean_pool.backward(new(8, 4096), pooled, factor, m, dtype, normalize)

        return f"pool {names[dtype]} {mask}, normalize={normalize}".replace("torch.", ""), call

    for dtype in names:
        yield pool(dtype, torch.bool, True)
    yield pool(torch.bfloat16, torch.int64, False)

    def similarity(dtype: torch.dtype, count: int, normalize: bool, recenter: bool) -> Case:
        def call() -> None:
            a, options = new(10, count, 4096, dtype=dtype), (20.0, normalize, recenter)
            s = contrastive_similarity.forward(a, a, *options)
            contrastive_similarity.backward(s, a, a, *options, True, True)

        return f"similarity {names[dtype]} N={count}, normalize={normalize}, recenter={recenter}", call

    def loss(dtype: torch.dtype, count: int, normalize: bool, recenter: bool, scale: float) -> Case:
        def call() -> None:
            a, options = new(10, count, 4096, dtype=dtype), (scale, normalize, recenter)
            loss, rows, columns = info_nce.forward(a, a, *options)
            info_nce.backward(loss, a, a, rows, columns, *options, True, True)

        options = f"normalize={normalize}, recenter={recenter}, scale={scale:g}"
        return f"info_nce {names[dtype]} N={count}, {options}", call

    for dtype in names:
        for count in (64, 1024):
            yield similarity(dtype, count, True, False)
            yield loss(dtype, count, True, False, 20.0)
    for dtype in (torch.bfloat16, torch.float32):
        for count in (16, 32, 128):
            yield loss(dtype, count, True, False, 20.0)
        yield loss(dtype, 64, False, False, 1.0)
        yield loss(dtype, 1024, True, False, 100.0)
        for normalize in (False, True):
            yield similarity(dtype, 1024, normalize, True)
            yield loss(dtype, 1024, normalize, True, 20.0)


def compile_for(target: str, only: str = "") -> list[dict[str, Any]]:
    """Run every case against ``target`` and describe each kernel that a launcher would have launched."""
    import torch
    from triton.runtime.jit import JITFunction

    backend = TARGETS[target][0]
    stand_in_driver.activate(TARGETS[target])
    torch.version.hip = "for this target" if backend == "hip" else None
    rows: dict[str, dict[str, Any]] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        rows.setdefault(compiled.hash, {"kernel": self.__name__.lstrip("_"), "case": label, "of": compiled})
        return compiled

    JITFunction.run = compile_only
    try:
        for label, call in cases():
            if only in label:
                call()
    finally:
        JITFunction.run = launch
    return [
        {"target": target, "kernel": row["kernel"], "case": row["case"], **_describe(row["of"], backend)}
        for row in rows.values()
    ]


def _describe(compiled: Any, backend: str) -> dict[str, Any]:
    metadata = compiled.metadata
    facts = {"threads": metadata.num_warps * (64 if backend == "hip" else 32), "shared": metadata.shared}
    if backend == "hip":
        assembly = compiled.asm["amdgcn"]
        facts |= {
            "registers": _number(r"\.vgpr_count:\s*(\d+)", assembly)
            + _number(r"\.agpr_count:\s*(\d+)", assembly),
            "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", assembly)
            + _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
        }
    else:
        assembly = compiled.asm["ptx"]
        usage = _resources(compiled.asm["cubin"])
        facts |= {
            "registers": _number(r"REG:(\d+)", usage),
            "spills": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        }
    loads, stores, narrow = _accesses(assembly)
    return facts | {"loads": loads, "stores": stores, "narrow": narrow}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in what the compiler printed: {text[:200]!r}")
    return int(found[1])


def _resources(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_PTX = re.compile(r"\b(?P<kind>ld|st)\.global(?:\.\w+)*?(?:\.v(?P<count>\d))?\.[bfus](?P<bits>\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\s+\[.*?\],\s*\[.*?\],\s*(?P<bytes>0x[0-9a-f]+|\d+)")
_AMD = re.compile(
    r"\b(?:global|buffer)_(?P<kind>load|store)_(?:dword(?:x(?P<count>\d))?|[us]?(?P<small>byte|short))"
)
_PLACE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')


def _accesses(assembly: str) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """Accesses by width in bits, and the pointers behind those of less than 128."""
    files: dict[str, Path] = {}
    counts: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    narrow: set[str] = set()
    for file in filter(None, map(_FILE.match, assembly.splitlines())):
        files[file[1]] = Path(file[2], file[3]) if file[3] else Path(file[2])
    place: tuple[str, int] | None = None
    for line in assembly.splitlines():
        if found := _PLACE.match(line):
            place = (found[1], int(found[2])) if int(found[2]) else None
            continue
        access = _width(line)
        if access is None:
            continue
        kind, bits = access
        counts[kind][bits] += 1
        if bits < 128:
            narrow.add(
                f"{kind} {'unknown' if place is None else _pointer(_source(files[place[0]]), place[1] - 1)}"
            )
    loads, stores = ({str(bits): n for bits, n in sorted(counter.items())} for counter in counts.values())
    return loads, stores, sorted(narrow)


def _width(line: str) -> tuple[str, int] | None:
    if found := _PTX.search(line):
        return ("load" if found["kind"] == "ld" else "store"), int(found["bits"]) * int(found["count"] or 1)
    if found := _COPY.search(line):
        return "load", 8 * int(found["bytes"], 0)
    if found := _AMD.search(line):
        bits = {"byte": 8, "short": 16}.get(found["small"] or "", 32 * int(found["count"] or 1))
        return found["kind"], bits
    return None


def _pointer(source: list[str], line: int) -> str:
    """The pointer of the access at a line; a compiler may place an access a few lines late."""
    if re.search(r"tl\.(load|store)\(\s*$", source[line]):
        line += 1
    for candidate in (line, *range(line - 1, max(line - 8, 0), -1)):
        if re.search(r"tl\.(load|store)\(", source[candidate]) and (
            found := re.search(r"\w+_ptr", source[candidate])
        ):
            return found[0]
    return source[line].strip()


@cache
def _source(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel variant without a GPU.")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the table there instead of printing it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="targets compiled at the same time (default 2)")
    arguments = parser.parse_args()
    targets = arguments.target or list(TARGETS)
    with (
        tempfile.TemporaryDirectory() as compiled,
        concurrent.futures.ProcessPoolExecutor(arguments.jobs, max_tasks_per_child=1) as pool,
    ):
        # Triton's own cache is shared by every clone on a machine, and what lies in it names the files of the clone
        # that compiled it, which may be gone.
        os.environ["TRITON_CACHE_DIR"] = compiled
        tables = pool.map(compile_for, targets, [arguments.only] * len(targets))
        rows = sorted(
            (row for table in tables for row in table),
            key=lambda row: (row["kernel"], row["case"], row["target"]),
        )
    if arguments.json:
        text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
        arguments.json.write_text(text, encoding="utf-8")
        return
    columns = (
        "kernel",
        "target",
        "threads",
        "registers",
        "spills",
        "shared",
        "loads",
        "stores",
        "narrow",
        "case",
    )
    sys.stdout.write("\t".join(columns) + "\n")
    for row in rows:
        sys.stdout.write("\t".join(str(row[column]) for column in columns) + "\n")


if __name__ == "__main__":
    main()
