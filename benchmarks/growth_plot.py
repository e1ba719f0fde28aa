"""How a step's cost grows with the work, drawn from records (``make performance`` does it where there are any).

    python benchmarks/growth_plot.py RECORD... [--out docs/images/growth.png]

A record is what ``processes.py`` writes, or ``step/growth.py``: ``machine``, ``size``, ``curves``: by what grows
(languages, boundaries, pairs, length, processes) a list of points ``{"at": 4, "seconds": [1.52, 1.49, …]}``, and,
where the matrix products of a step were counted, ``"flops"``. One panel each: medians with quartiles, from zero,
and dashed what the products alone would take at the rate of the first point.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

UNITS = {
    "languages": "languages in the batch",
    "boundaries": "boundaries of the contrastive loss, b - f",
    "pairs": "sentence pairs",
    "length": "tokens of an instruction",
    "processes": "processes, the same global batch",
}
Record = dict[str, Any]
Points = list[dict[str, Any]]


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    lower, middle, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return lower, middle, upper


def bound(points: Points) -> list[float] | None:
    """What the products of each point would take at the rate of the first; None where they were not counted."""
    if not all(point.get("flops") for point in points):
        return None
    rate = points[0]["flops"] / statistics.median(points[0]["seconds"])
    return [point["flops"] / rate for point in points]


def draw(records: Sequence[Record]) -> Figure:
    """A panel for each quantity that any record has, a line for each record in the colour of its size.

    Raises:
        ValueError: a record has a quantity of an unknown name, or none has any.
    """
    if unknown := sorted({name for record in records for name in record["curves"]} - UNITS.keys()):
        raise ValueError(f"curves: got {', '.join(unknown)}; wanted some of {', '.join(UNITS)}")
    names = [name for name in UNITS if any(record["curves"].get(name) for record in records)]
    if not names:
        raise ValueError("curves: no record has any; nothing can be drawn")
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    sizes = list(dict.fromkeys(record["size"] for record in records))
    for panel, name in zip(panels, names, strict=True):
        for record in records:
            points: Points = sorted(record["curves"].get(name, []), key=lambda point: point["at"])
            if not points:
                continue
            color, at = f"C{sizes.index(record['size'])}", [point["at"] for point in points]
            lower, middle, upper = zip(*(spread(point["seconds"]) for point in points), strict=True)
            errors = [
                [m - one for m, one in zip(middle, lower, strict=True)],
                [one - m for m, one in zip(middle, upper, strict=True)],
            ]
            panel.errorbar(at, middle, errors, fmt="o-", color=color, capsize=2, label=record["size"])
            if (products := bound(points)) is not None:
                panel.plot(
                    at, products, "--", color=color, alpha=0.7, label=f"{record['size']}: products alone"
                )
        panel.set_xlabel(UNITS[name])
        panel.set_ylim(bottom=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds of a step")
    panels[0].legend(fontsize=7, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/growth.png"))
    options = parser.parse_args()
    figure = draw([json.loads(file.read_text(encoding="utf-8")) for file in options.records])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
