"""The report's section on a sweep over layer areas."""

from __future__ import annotations

from shifcon_fast.evaluation.page import Block, Cell, Picture, Section, Table, Text
from shifcon_fast.evaluation.sweep_plot import sweep_plot
from shifcon_fast.evaluation.sweep_table import (
    answers_text,
    area_text,
    change_text,
    decision,
    dose_text,
    ratio_text,
)
from shifcon_fast.space.sweep_result import AreaSweep

_MOST_LANGUAGES = 8  # beyond so many the report's table shows the worst alone


def sweep_section(sweep: AreaSweep) -> Section:
    """For every alpha what it says and a heat map; then the figures."""
    blocks: list[Block] = []
    for alpha in sweep.alphas:
        area, reason = decision(sweep, alpha)
        blocks += [
            Text([reason]),
            Picture.draw(
                sweep_plot,
                sweep,
                alpha=alpha,
                chosen=(area.forward, area.backward) if area else None,
                alt="Heat maps over the area's two boundaries: the worst language's perplexity with the shift "
                f"against without, and what is gained{_with(sweep, alpha)}.",
                caption=f"The shift on, no training{_with(sweep, alpha)}; the pivot's rows are never changed. "
                f"Areas that raise a language's perplexity by more than {sweep.max_perplexity_rise:.0%} are not "
                "recommended.",
            ),
        ]
    shown = sweep.languages if len(sweep.languages) <= _MOST_LANGUAGES else []
    header = ["area", *(["alpha"] if len(sweep.alphas) > 1 else []), "dose at f, b"]
    header += [f"perplexity {code}" for code in shown] or ["perplexity, worst"]
    header += ["retrieval", "MEXA", *(["right answers"] if sweep.right else [])]
    rows: list[list[Cell | str]] = []
    for area in sweep.areas:
        row: list[Cell | str] = [area_text(area)]
        if len(sweep.alphas) > 1:
            row.append(f"{area.alpha:g}")
        row.append(dose_text(area))
        language, worst = sweep.worst(area)
        row += [Cell(ratio_text(sweep.perplexity_ratio(area, code))) for code in shown] or [
            Cell(ratio_text(worst), language)
        ]
        row += [change_text(sweep.retrieval_change(area)), change_text(sweep.retrieval_change(area, "mexa"))]
        if sweep.right:
            row.append(answers_text(sweep, area))
        rows.append(row)
    caption = (
        "Perplexity with the shift over perplexity without it. Retrieval (top-1, both directions) and MEXA in "
        "percent, mean over the boundaries of the area, unshifted → shifted. Dose: length of the shift over the "
        "median hidden state's, the largest of the languages. Right answers: points, with their 95 % interval over "
        "questions."
    )
    return Section("What the shift does, by area", [*blocks, Table(header, rows, caption)])


def _with(sweep: AreaSweep, alpha: float) -> str:
    return f", alpha {alpha:g}" if len(sweep.alphas) > 1 or alpha != 1 else ""
