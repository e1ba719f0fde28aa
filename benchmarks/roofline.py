"""The roofline plot: how near each operator comes to the device's ceiling, against the size of the problem.

    python benchmarks/roofline.py DIR [--out docs/images/roofline.png]

DIR is what ``scripts/gpu_check.sh`` wrote. An operator that moves bytes is drawn as a share of the copy's bandwidth
in ``DIR/ceilings.json`` over the bytes it must move; one that forms products, as a share of the matrix product's
rate in its dtype over its operations. One curve per operator and dtype: ours solid, the fastest peer dashed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS = "ours"
_SIZE = re.compile(r"[\s,]*\b\d+(?:x\d+)+\b[\s,]*")


@dataclass(frozen=True)
class Point:
    """One measured case: how large it is, and the share of the ceiling that ours and the fastest peer reach."""

    size: float
    ours: float
    peer: float | None
    peer_name: str | None


Curves = dict[tuple[str, str], list[Point]]  # (panel, label) → points by size


def operator_of(case: str) -> str:
    """The case without its sizes: "norm forward 8192x4096" → "norm forward"."""
    return _SIZE.sub(" ", case).strip()


def curves(benchmarks: Sequence[dict[str, Any]], ceilings: dict[str, Any]) -> Curves:
    """What is to be drawn.

    Args:
        benchmarks: the rows of benchmarks.jsonl; those with neither ``moved`` nor ``flops`` have no ceiling and
            are left out.
        ceilings: of ceilings.json.

    Raises:
        ValueError: no row has a ceiling.
    """
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in benchmarks:
        if "ms" in row and (row.get("moved") or row.get("flops")):
            cases[row["case"]].append(row)
    found: Curves = defaultdict(list)
    for case, rows in cases.items():
        ours = next((row for row in rows if row["peer"] == OURS), None)
        if ours is None:
            continue
        panel = "bytes" if ours.get("moved") else "operations"
        work = ours["moved"] or ours["flops"]
        ceiling = (
            ceilings["copy_bytes_s"] if panel == "bytes" else ceilings["matmul_flop_s"].get(ours.get("dtype"))
        )
        if ceiling is None:
            continue
        # A peer that computes less (ours without its shift, say) is not a peer.
        peers = [row for row in rows if not row["peer"].startswith(OURS)]
        best = min(peers, key=lambda row: row["ms"], default=None)

        def share(row: dict[str, Any], work: float = work, ceiling: float = ceiling) -> float:
            return 100 * work / (row["ms"] / 1e3) / ceiling

        dtype = ours.get("dtype")
        label = " ".join(filter(None, [operator_of(case), None if dtype and dtype in case else dtype]))
        point = Point(work, share(ours), best and share(best), best and best["peer"])
        found[panel, label].append(point)
    if not found:
        raise ValueError("benchmarks: no row of ours says what it moves or computes; nothing can be drawn")
    return {key: sorted(points, key=lambda point: point.size) for key, points in sorted(found.items())}


def draw(found: Curves, device: str) -> Any:
    """A figure with one panel per kind of ceiling."""
    panels = sorted({panel for panel, _ in found})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    labels = {"bytes": ("bytes moved", "copy bandwidth"), "operations": ("operations", "matrix product rate")}
    for axis, panel in zip(axes[0], panels, strict=True):
        what, ceiling = labels[panel]
        mine = [(label, points) for (where, label), points in found.items() if where == panel]
        for number, (label, points) in enumerate(mine):
            color = f"C{number % 10}"
            sizes = [point.size for point in points]
            axis.plot(sizes, [point.ours for point in points], "o-", color=color, label=label)
            with_peer = [point for point in points if point.peer is not None]
            if with_peer:
                peers = ", ".join(sorted({str(point.peer_name) for point in with_peer}))
                axis.plot(
                    [point.size for point in with_peer],
                    [point.peer for point in with_peer],
                    "x--",
                    color=color,
                    alpha=0.6,
                    label=f"{label}: {peers}",
                )
        axis.axhline(100, color="black", linewidth=1)
        axis.set(xscale="log", xlabel=what, ylabel=f"% of {ceiling}", ylim=(0, None), title=device)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what gpu_check wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/images/roofline.png"))
    options = parser.parse_args()
    lines = (options.folder / "benchmarks.jsonl").read_text(encoding="utf-8").splitlines()
    ceilings = json.loads((options.folder / "ceilings.json").read_text(encoding="utf-8"))
    figure = draw(curves([json.loads(line) for line in lines], ceilings), ceilings["device"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
