"""What stands in the tables of docs/performance.md: a function per table, from records to Markdown.

``TABLES`` names them. Most are a ``Listing``: which records, and a column per figure of their rows. What no record
holds is *not measured*.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "*not measured*"
Record = dict[str, Any]
Row = dict[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read(file: Path) -> Record:
    record: Record = json.loads(file.read_text(encoding="utf-8"))
    return record


def figures(record: Record) -> list[Row]:
    """What a record of pytest-benchmark has measured: one row per case and peer."""
    return [bench["extra_info"] for bench in record["benchmarks"] if "ms" in bench["extra_info"]]


def on_cuda(record: Record) -> bool:
    return "multiprocessors" in record["machine_info"]


def on_cpu(record: Record) -> bool:
    return not on_cuda(record)


def _short(processor: str) -> str:
    return " ".join(processor.replace("(R)", "").replace("Processor", "").split())


def device(record: Record) -> str:
    """What it was measured on, as a column says it."""
    about = record["machine_info"]
    if on_cuda(record):
        return str(about["device"])
    name = _short(str(about["cpu"].get("brand_raw", "a CPU")))
    level = about.get("level", "best level")
    kept = ", held to it" if "ATEN_CPU_CAPABILITY" in about["environment"] else ""
    return f"{name}, {level}{kept}, {about['threads']} threads, torch {about['packages']['torch']}"


def duration(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1e3:.2f} s"
    return f"{ms:.2f} ms" if ms >= 0.1 else f"{ms * 1e3:.1f} µs"


# --- runs of the suites, one peer after the other: a column per run


@dataclass(frozen=True)
class Case:
    """A row: what the page calls it, the goal, the case in the records, and whether memory is its limit."""

    title: str
    goal: str
    case: str
    memory: bool = False


_RUNS = [
    Case(
        "`add_shift_rms_norm` forward, 2,048 × 2,048",
        "≥ 7 ×, ≥ 1.4 ×, ≥ 75 %",
        "norm forward 2048x2048",
        True,
    ),
    Case(
        "… backward, frozen weight",
        "≥ 5 ×, ≥ 1.3 ×, ≥ 65 %",
        "norm backward, weight frozen, 2048x2048",
        True,
    ),
    Case("… backward, trainable weight", "–", "norm backward, weight trainable, 2048x2048", True),
    Case(
        "`masked_mean_pool` forward + backward, 32 × 128 × 2,048",
        "≥ 3 ×, ≥ 1.2 ×, ≥ 70 %",
        "pool forward and backward 32x128x2048",
        True,
    ),
    Case(
        "`info_nce` forward + backward, 8 × 64 × 2,048",
        "≥ 2 ×, ≥ 1 ×",
        "info_nce forward + backward 8x64x2048 bfloat16",
    ),
    Case("… float32, 10 × 64 × 4,096", "–", "info_nce forward + backward 10x64x4096 float32"),
    Case(
        "`subspace_project`, 8 languages, k = 64, 4,096 × 2,048",
        "≥ 3 ×, ≥ 1.5 ×",
        "projection forward 4096x2048, 8 languages, rank 64",
    ),
    Case("… backward", "–", "projection backward 4096x2048, 8 languages, rank 64"),
    Case(
        "one small call, `add_shift_rms_norm` 1 × 4,096",
        "≥ 4 ×, ≤ 10 µs",
        "norm, one small call, 1x4096",
    ),
]
_TURNS = [
    Case("forward: eager, `torch.compile`", "≥ 7 ×, ≥ 1.4 ×", "norm forward, in turns, 2048x2048"),
    Case("backward, frozen weight", "≥ 5 ×, ≥ 1.3 ×", "norm backward, weight frozen, in turns, 2048x2048"),
]


def runs(results: Path) -> str:
    """Our time, how many times as long eager takes and the best compiled peer, and our share of a copy."""
    files = sorted((results / "cpu").glob("run*.json"))

    def cell(record: Record, case: Case) -> str:
        rows = {row["peer"]: row for row in figures(record) if row["case"] == case.case}
        ours = rows["ours"]["ms"]
        compiled = min(row["ms"] for peer, row in rows.items() if peer.startswith("torch.compile"))
        text = f"{duration(ours)}: {rows['eager']['ms'] / ours:.1f} ×, {compiled / ours:.2f} ×"
        return text + (f", {rows['ours']['percent_of_copy']:.0f} %" if case.memory else "")

    return _by_run("Operator", "Run ", files, _RUNS, cell)


def turns(results: Path) -> str:
    """The norm in turns."""
    files = sorted((results / "cpu").glob("in_turns*.json"))

    def cell(record: Record, case: Case) -> str:
        row = next(row for row in figures(record) if row["case"] == case.case)
        ratios = row["times_as_long"]
        return f"{duration(row['ms'])}: {ratios['eager']:.1f} ×, {ratios['torch.compile']:.2f} ×"

    return _by_run("Norm in turns", "", files, _TURNS, cell)


def _by_run(
    first: str,
    prefix: str,
    files: Sequence[Path],
    cases: Sequence[Case],
    cell: Callable[[Record, Case], str],
) -> str:
    records = [read(file) for file in files]
    head = [
        first,
        "Goal",
        *(f"[{prefix}{n}](../benchmarks/results/cpu/{f.name})" for n, f in enumerate(files, 1)),
    ]
    return markdown(
        head, [[case.title, case.goal, *(cell(record, case) for record in records)] for case in cases]
    )


# --- records of which every row is shown


def times(peer: str) -> Callable[[Row], str]:
    """How many times as long a peer takes as ours, with the quartiles of the ratio turn by turn."""

    def show(row: Row) -> str:
        ratio = row["times_as_long"].get(peer)
        if ratio is None:
            return "–"
        lower, upper = row["quartiles"][peer]
        return f"{ratio:.2f} × ({lower:.2f}–{upper:.2f})"

    return show


def share(peer: str) -> Callable[[Row], str]:
    """Ours over a peer: the inverse of ``times``."""

    def show(row: Row) -> str:
        ratio = row["times_as_long"].get(peer)
        if ratio is None:
            return "–"
        lower, upper = row["quartiles"][peer]
        return f"{1 / ratio:.3f} ({1 / upper:.3f}–{1 / lower:.3f})"

    return show


def percent_of_copy(row: Row) -> str:
    return f"{row['percent_of_copy']:.0f} %" if "percent_of_copy" in row else "–"


@dataclass(frozen=True)
class Listing:
    """A table of all rows of some records, one after the other, each with a link to its record.

    Attributes:
        pattern: of the records, under results/.
        columns: head and what stands under it, from a row.
        rows: of a record; by default those of pytest-benchmark's.
        about: what a record was measured on.
        wanted: whether a record is one of this table's.
    """

    pattern: str
    columns: dict[str, Callable[[Row], str]]
    rows: Callable[[Record], list[Row]] = figures
    about: Callable[[Record], str] = device
    wanted: Callable[[Record], bool] = lambda _: True

    def __call__(self, results: Path) -> str:
        lines = []
        for file in sorted(results.glob(self.pattern)):
            record = read(file)
            if not self.wanted(record):
                continue
            link = f"[{self.about(record)}](../benchmarks/results/{file.relative_to(results)})"
            for row in self.rows(record):
                lines.append([*(show(row) for show in self.columns.values()), link])
                link = "″"
        return markdown([*self.columns, "Record"], lines or [[NOT_MEASURED] * (len(self.columns) + 1)])


_CASE = {"Case": lambda row: row["case"], "Ours": lambda row: duration(row["ms"])}

# --- one training step


def step_rows(record: Record) -> list[Row]:
    """The variants of every size, beside what the authors' step and plain QLoRA's took."""
    found = []
    for size in figures(record):
        variants = size["variants"]
        authors, plain = variants["authors' recipe"], variants["plain QLoRA"]
        for name, row in variants.items():
            if "ms" in row:
                bound = plain["ms"] * row["flops"] / plain["flops"]
                own = {"size": size["size"], "variant": name, "bound": row["ms"] / bound}
                reached = (authors["ms"] / row["ms"]) / (authors["flops"] / row["flops"])
                own |= {"authors": authors["ms"] / row["ms"], "of_flops": reached}
                if row.get("peak_mib") and authors.get("peak_mib"):
                    own["memory"] = row["peak_mib"] / authors["peak_mib"]
                own["by_turn"] = _ratios(row, variants["ours"])
                found.append({**row, **own})
    return found


def _ratios(row: Row, ours: Row) -> list[float]:
    return [a / b for a, b in zip(row.get("seconds", ()), ours.get("seconds", ()), strict=False)]


def _by_turn(ratios: Sequence[float]) -> str:
    """The median of ratios, and their quartiles."""
    if len(ratios) < 2:
        return "–"
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({lower:.3f}–{upper:.3f})"


def _memory(row: Row) -> str:
    return f"{row['peak_mib']:.0f} MiB" if row.get("peak_mib") else "–"


_STEP: dict[str, Callable[[Row], str]] = {
    "Shape": lambda row: row["size"],
    "Step": lambda row: row["variant"],
    "Time": lambda row: f"{duration(row['ms'])} ± {100 * row['iqr_ms'] / 2 / row['ms']:.0f} %",
    "Authors' step ÷ this": lambda row: f"{row['authors']:.2f}",
    "… of the ratio in FLOPs": lambda row: f"{row['of_flops']:.2f}",
    "This ÷ plain QLoRA × needed FLOPs": lambda row: f"{row['bound']:.2f}",
    "Peak memory": _memory,
    "÷ authors'": lambda row: f"{row['memory']:.2f}" if row.get("memory") else "–",
    "This ÷ ours, turn by turn": lambda row: _by_turn(row["by_turn"]),
    "Loss": lambda row: f"{row['loss']:.4f}",
}

# --- records that are not pytest-benchmark's: what a part of the step costs


def machine(record: Record) -> str:
    """What a record of ``machine.py``, or of a script of its own, was measured on."""
    about = record.get("machine", record)
    name = about.get("device", "cpu")
    if name == "cpu":
        name = _short(about["processor"])
        levels = about.get("instructions", [])
        name += f" ({levels[-1]})" if levels else ""
    return f"{name}, torch {about['versions']['torch'].split('+')[0]}"


def cached_pairs(record: Record) -> list[Row]:
    """Gradient caching, one row per shape."""
    return [
        {
            "case": size,
            "pairs": row["cached"][0]["pairs"],
            "one": row["one pass"][0]["pairs"],
            "time": row["time per pair, cached / one pass"],
            "memory": row["peak, cached / one pass"],
            "checkpointing": record.get("checkpointing", False),
        }
        for size, row in record["sizes"].items()
    ]


_CACHED: dict[str, Callable[[Row], str]] = {
    "Shape": lambda row: row["case"],
    "Pairs": lambda row: f"{row['pairs']} in passes of {row['one']}",
    "Blocks checkpointed": lambda row: "yes" if row["checkpointing"] else "no",
    "Time per pair ÷ one pass": lambda row: f"{row['time']:.2f}",
    "Peak memory ÷ one pass": lambda row: f"{row['memory']:.2f}",
}
_PROCESSES: dict[str, Callable[[Row], str]] = {
    "Shape": lambda row: row["size"],
    "Cores": lambda row: str(row["cores"]),
    "Two processes ÷ one": lambda row: f"{row['two processes / one']:.3f}",
    "Loss, one process": lambda row: f"{row['one process'][0]['loss']:.6f}",
    "Loss, two": lambda row: f"{row['two processes'][0]['loss']:.6f}",
}


def loss_ways(record: Record) -> list[Row]:
    """The loss without logits, one row per shape, dtype and share of learnt tokens."""
    return [{**case, "tokens": record["tokens"]} for case in record["cases"]]


def _way(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['median'][name]:.2f} s, {row['peak_mib'][name]} MiB"


_LOSS: dict[str, Callable[[Row], str]] = {
    "Shape": lambda row: row["shape"],
    "dtype": lambda row: row["dtype"],
    "Learnt tokens": lambda row: f"{row['learnt']} of {row['tokens']}",
    "All logits": _way("all logits"),
    "Logits of the learnt": _way("learnt logits"),
    "Chunked": _way("chunked"),
    "Loss: all logits, chunked": lambda row: f"{row['loss']['all logits']:.5f}, {row['loss']['chunked']:.5f}",
}


def growth_rows(record: Record) -> list[Row]:
    """One row per curve of ``step/growth.py``."""
    return [
        {"size": record["size"], "what": name, "points": points} for name, points in record["curves"].items()
    ]


def _points(row: Row) -> str:
    """The median at every point, and, where products were counted, what they alone would take from the first on."""
    first = row["points"][0]
    told = []
    for point in row["points"]:
        text = f"{point['at']}: {statistics.median(point['seconds']):.2f} s"
        if first.get("flops") and point.get("flops"):
            bound = statistics.median(first["seconds"]) * point["flops"] / first["flops"]
            text += f" ({bound:.2f})"
        told.append(text)
    return ", ".join(told)


_GROWTH: dict[str, Callable[[Row], str]] = {
    "Shape": lambda row: row["size"],
    "What grows": lambda row: row["what"],
    "Step (products alone, from the first point on)": _points,
}

TABLES: dict[str, Callable[[Path], str]] = {
    "runs": runs,
    "turns": turns,
    "operators": Listing(
        "*/operators*.json",
        {
            **_CASE,
            "eager": times("eager"),
            "eager, float32 inside": times("eager, float32 inside"),
            "Of copy": percent_of_copy,
        },
    ),
    "blocks": Listing(
        "*/blocks.json", {**_CASE, "transformers, shift by hooks": times("transformers, shift by hooks")}
    ),
    "models": Listing(
        "*/models*.json",
        {
            **_CASE,
            "Decoding, on ÷ off": share("shift off"),
            "Estimation ÷ bare passes": share("bare forward passes"),
        },
    ),
    "interventions": Listing(
        "*/interventions.json",
        {
            "Case": lambda row: row["case"],
            "Subspaces": lambda row: f"{duration(row['ms'])} ({row['backend']})",
            "… ÷ the reference backend": share("reference"),
            "… ÷ the mean shift": share("mean shift"),
            "… ÷ `affine`": share("affine"),
            "… ÷ no shift": share("shift off"),
        },
    ),
    "step on a CPU": Listing("*/step*.json", _STEP, rows=step_rows, wanted=on_cpu),
    "step on a GPU": Listing("*/step*.json", _STEP, rows=step_rows, wanted=on_cuda),
    "loss without logits": Listing("chunked_loss/*.json", _LOSS, rows=loss_ways, about=machine),
    "gradient caching": Listing("gradient_cache/*.json", _CACHED, rows=cached_pairs, about=machine),
    "growth": Listing("growth/*.json", _GROWTH, rows=growth_rows, about=machine),
    "two processes": Listing("processes/*.json", _PROCESSES, rows=lambda record: [record], about=machine),
}
