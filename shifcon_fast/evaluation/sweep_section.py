"""A sweep over layer areas for readers: its table, and its section of a report."""

from __future__ import annotations

import math

from shifcon_fast.evaluation.page import Block, Cell, Picture, Section, Table, Text
from shifcon_fast.evaluation.sweep_plot import sweep_plot
from shifcon_fast.space.area_decision import decide, passes
from shifcon_fast.space.sweep_result import AreaSweep, SweptArea

_MOST_LANGUAGES = 8  # beyond so many the report's table shows the worst alone


def sweep_table(sweep: AreaSweep) -> str:
    """One line an area, for a terminal. ``<`` marks areas that pass, ``<<`` the one to take, of each alpha."""
    taken = [_decision(sweep, alpha)[0] for alpha in sweep.alphas]
    lines = [
        "area      alpha   dose f, b     perplexity, worst   retrieval, %    MEXA, %         right answers, points"
    ]
    for area in sweep.areas:
        language, ratio = sweep.worst(area)
        top1, mexa = (_arrow(sweep.retrieval_change(area, measure)) for measure in ("top1", "mexa"))
        mark = "<<" if area in taken else "<" if passes(sweep, area, sweep.max_perplexity_rise) else ""
        lines.append(
            f"{_name(area):8}  {area.alpha:5g}  {_dose(area):12}  {language:>4} {_ratio(ratio):14}  {top1:14}  "
            f"{mexa:14}  {_answers(sweep, area):21} {mark}".rstrip()
        )
    return "\n".join(lines)


def sweep_section(sweep: AreaSweep) -> Section:
    """For every alpha what it says and a heat map; then the figures."""
    blocks: list[Block] = []
    for alpha in sweep.alphas:
        area, reason = _decision(sweep, alpha)
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
        row: list[Cell | str] = [_name(area)]
        if len(sweep.alphas) > 1:
            row.append(f"{area.alpha:g}")
        row.append(_dose(area))
        language, worst = sweep.worst(area)
        row += [Cell(_ratio(sweep.perplexity_ratio(area, code))) for code in shown] or [
            Cell(_ratio(worst), language)
        ]
        row += [_arrow(sweep.retrieval_change(area)), _arrow(sweep.retrieval_change(area, "mexa"))]
        if sweep.right:
            row.append(_answers(sweep, area))
        rows.append(row)
    caption = (
        "Perplexity with the shift over perplexity without it. Retrieval (top-1, both directions) and MEXA in "
        "percent, mean over the boundaries of the area, unshifted → shifted. Dose: length of the shift over the "
        "median hidden state's, the largest of the languages. Right answers: points, with their 95 % interval over "
        "questions."
    )
    return Section("What the shift does, by area", [*blocks, Table(header, rows, caption)])


def _decision(sweep: AreaSweep, alpha: float) -> tuple[SweptArea | None, str]:
    return decide(sweep, alpha=alpha, max_perplexity_rise=sweep.max_perplexity_rise)


def _name(area: SweptArea) -> str:
    return f"[{area.forward}, {area.backward})"


def _with(sweep: AreaSweep, alpha: float) -> str:
    return f", alpha {alpha:g}" if len(sweep.alphas) > 1 or alpha != 1 else ""


def _dose(area: SweptArea) -> str:
    at_f, at_b = (max(dose[end] for dose in area.dose.values()) for end in (0, 1))
    return f"{at_f:.2f}, {at_b:.2f}"


def _ratio(ratio: float) -> str:
    return f"× {ratio:.3f}" if ratio < 10 else f"× {ratio:,.0f}" if math.isfinite(ratio) else "beyond range"


def _arrow(change: tuple[float, float]) -> str:
    return f"{100 * change[0]:.1f} → {100 * change[1]:.1f}"


def _answers(sweep: AreaSweep, area: SweptArea) -> str:
    change = sweep.accuracy_change(area)
    if change is None:
        return "–"
    low, high = change.interval
    text = f"{100 * change.estimate:+.1f}"
    if not math.isnan(low):
        text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text.replace("-", "−")
