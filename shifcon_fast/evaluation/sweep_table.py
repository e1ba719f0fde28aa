"""A sweep over layer areas for a terminal, and how its figures are written there and in a report."""

from __future__ import annotations

import math

from shifcon_fast.space.area_decision import decide, passes
from shifcon_fast.space.sweep_result import AreaSweep, SweptArea


def sweep_table(sweep: AreaSweep) -> str:
    """One line an area, for a terminal. ``<`` marks areas that pass, ``<<`` the one to take, of each alpha."""
    taken = [decision(sweep, alpha)[0] for alpha in sweep.alphas]
    lines = [
        "area      alpha   dose f, b     perplexity, worst   retrieval, %    MEXA, %         right answers, points"
    ]
    for area in sweep.areas:
        language, ratio = sweep.worst(area)
        top1, mexa = (change_text(sweep.retrieval_change(area, measure)) for measure in ("top1", "mexa"))
        mark = "<<" if area in taken else "<" if passes(sweep, area, sweep.max_perplexity_rise) else ""
        lines.append(
            f"{area_text(area):8}  {area.alpha:5g}  {dose_text(area):12}  {language:>4} {ratio_text(ratio):14}  "
            f"{top1:14}  {mexa:14}  {answers_text(sweep, area):21} {mark}".rstrip()
        )
    return "\n".join(lines)


def decision(sweep: AreaSweep, alpha: float) -> tuple[SweptArea | None, str]:
    """The area that a sweep recommends for an alpha, or None, and why."""
    return decide(sweep, alpha=alpha, max_perplexity_rise=sweep.max_perplexity_rise)


def area_text(area: SweptArea) -> str:
    """``[4, 12)``."""
    return f"[{area.forward}, {area.backward})"


def dose_text(area: SweptArea) -> str:
    """The largest dose of the languages at f and at b."""
    at_f, at_b = (max(dose[end] for dose in area.dose.values()) for end in (0, 1))
    return f"{at_f:.2f}, {at_b:.2f}"


def ratio_text(ratio: float) -> str:
    """A ratio of perplexities."""
    return f"× {ratio:.3f}" if ratio < 10 else f"× {ratio:,.0f}" if math.isfinite(ratio) else "beyond range"


def change_text(change: tuple[float, float]) -> str:
    """Shares before and after, in percent."""
    return f"{100 * change[0]:.1f} → {100 * change[1]:.1f}"


def answers_text(sweep: AreaSweep, area: SweptArea) -> str:
    """Right answers gained, in points, with their interval over questions."""
    change = sweep.accuracy_change(area)
    if change is None:
        return "–"
    low, high = change.interval
    text = f"{100 * change.estimate:+.1f}"
    if not math.isnan(low):
        text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text.replace("-", "−")
