"""A comparison of systems for the terminal."""

from __future__ import annotations

from shifcon_fast.evaluation.cells import points
from shifcon_fast.evaluation.system_comparison import SystemComparison


def systems_table(comparison: SystemComparison) -> str:
    """Right answers of every system, and its differences to the baseline, in the weak languages and the pivot."""
    group, others, pivot = comparison.headline, comparison.others, [comparison.pivot]
    width = max(map(len, comparison.systems))
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) != 1 else ''}"
    lines = [
        f"right answers{f', {group}' if group else ''}: mean of {', '.join(others)}; pivot {comparison.pivot}; and "
        f"points against {comparison.baseline} (95 % intervals over {seeds} and the questions)"
    ]
    for system in comparison.systems:
        cells = [
            f"{100 * comparison.share(system, codes, group).estimate:5.1f} %" for codes in (others, pivot)
        ]
        if system in comparison.contenders:
            for codes in (others, pivot):
                change = comparison.difference(system, comparison.baseline, codes, group)
                cells.append(f"{points(change)}{'' if change.excludes_zero else ', within noise'}")
        lines.append(f"  {system:{width}}  {'  '.join(cells)}")
    return "\n".join(lines)
