"""How the report's pictures look: themes, an empty figure, a legend, and the bytes of a drawn one.

Colours are told apart by people with colour blindness (Okabe & Ito 2008, https://jfly.uni-koeln.de/color/). Both
themes are for a transparent ground.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shifcon_fast.extras import needed_for

with needed_for("a picture"):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["svg", "png"]
WIDTH = 9.0
"""Inches; the page shows a picture at most about 900 pixels wide."""


@dataclass(frozen=True)
class Theme:
    """Colours of a picture."""

    ink: str
    muted: str
    grid: str
    shade: str
    heat: tuple[str, str, str]
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1f2430",
    muted="#8a92a3",
    grid="#e3e6ec",
    shade="#fbe3c8",
    heat=("#f4f6f9", "#7fb3d5", "#0b3c5d"),
    series=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b7280"),
)
DARK = Theme(
    ink="#e6e9f0",
    muted="#8d96a8",
    grid="#343b49",
    shade="#4a3a26",
    heat=("#1d232e", "#2f6f9f", "#b8e1ff"),
    series=("#5bb0ea", "#ff8f57", "#3fc79a", "#e59fca", "#f0bf4c", "#a5d8ff", "#a3abb9"),
)


def new_figure(
    theme: Theme, panels: int, *, height: float, width: float = WIDTH, share_y: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure with some panels side by side; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    all_axes = figure.subplots(1, panels, squeeze=False, sharey=share_y)[0]
    for axes in all_axes:
        axes.patch.set_alpha(0)
        axes.grid(color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.ink, labelsize=9.5, length=0)
        axes.xaxis.label.set(color=theme.ink, fontsize=10)
        axes.yaxis.label.set(color=theme.ink, fontsize=10)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(theme.muted)
    return figure, all_axes


def add_legend(figure: Figure, handles: Sequence[Any], theme: Theme) -> None:
    """A frameless legend below the panels, in as many rows as its labels need."""
    letters = sum(len(handle.get_label()) + 9 for handle in handles)  # 9: the mark and the gaps around it
    rows = math.ceil(letters / (13 * figure.get_figwidth()))
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=math.ceil(len(handles) / rows),
        frameon=False,
        fontsize=9.5,
        labelcolor=theme.ink,
    )


def readable_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever reads better on a colour (relative luminance of WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "#101418" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.2 else "#ffffff"


def to_bytes(figure: Figure, file_format: Format) -> bytes:
    """The figure as a file; the same numbers give the same bytes."""
    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "shifcon_fast", "svg.fonttype": "path"}):
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(stream, format=file_format, dpi=160, transparent=True, metadata=metadata)
    return stream.getvalue()
