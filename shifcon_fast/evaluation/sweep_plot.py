"""The heat map of a sweep over layer areas, as SVG or PNG bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shifcon_fast.evaluation.plot_style import LIGHT, WIDTH, Format, Theme, new_figure, readable_on, to_bytes
from shifcon_fast.extras import needed_for
from shifcon_fast.space.sweep_result import AreaSweep, SweptArea

with needed_for("a picture"):
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

_MOST_NUMBERED = 9  # values of an axis up to which cells are numbered
_LARGEST_RATIO = 10.0  # a model that far off says nothing; the colours end there
_LEAST_RATIO = 2.0  # the scales reach at least so far, so that small effects look small
_LEAST_GAIN = 0.05


@dataclass(frozen=True)
class _Panel:
    """One quantity by area: what to colour, what to write, on which scale."""

    title: str
    values: dict[tuple[int, int], float]
    labels: dict[tuple[int, int], str]
    colours: Colormap
    scale: Normalize
    ticks: Sequence[float]
    written: Callable[[float], str]


def sweep_plot(
    sweep: AreaSweep,
    *,
    alpha: float | None = None,
    chosen: tuple[int, int] | None = None,
    theme: Theme = LIGHT,
    file_format: Format = "svg",
) -> bytes:
    """What the shift does by area: to the worst language's perplexity, and to right answers (else retrieval).

    Args:
        alpha: of these areas; None takes the sweep's first.
        chosen: (forward, backward) of the area to mark.

    Raises:
        ValueError: no area of that alpha was measured.
    """
    alpha = alpha if alpha is not None else next(iter(sweep.alphas), None)
    areas = [area for area in sweep.areas if area.alpha == alpha]
    if not areas:
        raise ValueError(
            f"alpha: got {alpha}; the sweep has {', '.join(map(str, sweep.alphas)) or 'no area'}"
        )
    forwards = sorted({area.forward for area in areas})
    backwards = sorted({area.backward for area in areas})
    side = 0.6 * WIDTH / 2 / len(forwards)
    height = min(0.8 * WIDTH, max(2.4, side * len(backwards) + 1.5))
    figure, all_axes = new_figure(theme, 2, height=height)
    for axes, panel in zip(all_axes, (_harm(sweep, areas, theme), _gain(sweep, areas, theme)), strict=True):
        _draw(axes, panel, forwards, backwards, theme)
        if chosen is not None and chosen in panel.values:
            corner = forwards.index(chosen[0]) - 0.5, backwards.index(chosen[1]) - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=theme.ink, linewidth=2.4, zorder=3))
    all_axes[0].set_ylabel("back at boundary b")
    return to_bytes(figure, file_format)


def _harm(sweep: AreaSweep, areas: Sequence[SweptArea], theme: Theme) -> _Panel:
    worst = {(area.forward, area.backward): sweep.worst(area) for area in areas}
    ratios = {where: min(ratio, 1e9) for where, (_, ratio) in worst.items()}  # infinity would leave a hole
    least = min(1.0, *ratios.values())
    largest = min(max(_LEAST_RATIO, *ratios.values()), _LARGEST_RATIO)
    ladder = (1, 1.25, 1.5, 2) if largest <= 3 else (1, 1.5, 2, 3, 5, 10)
    return _Panel(
        title="worst language's perplexity, shifted / unshifted",
        values=ratios,
        labels={where: f"{_factor(ratio)}\n{language}" for where, (language, ratio) in worst.items()},
        colours=LinearSegmentedColormap.from_list("harm", (theme.heat[0], theme.series[4], theme.series[1])),
        scale=LogNorm(least, largest, clip=True),
        ticks=[tick for tick in ladder if tick <= largest],
        written=lambda ratio: f"×{ratio:g}" + (" and more" if ratio == _LARGEST_RATIO else ""),
    )


def _gain(sweep: AreaSweep, areas: Sequence[SweptArea], theme: Theme) -> _Panel:
    gains = {}
    for area in areas:
        accuracy, (before, after) = sweep.accuracy_change(area), sweep.retrieval_change(area)
        gains[area.forward, area.backward] = after - before if accuracy is None else accuracy.estimate
    reach = max(_LEAST_GAIN, *(abs(gain) for gain in gains.values()))
    asked = any(area.right for area in areas)
    return _Panel(
        title="right answers, points gained" if asked else "retrieval inside the area, points gained",
        values=gains,
        labels={where: _points(gain) for where, gain in gains.items()},
        colours=LinearSegmentedColormap.from_list("gain", (theme.series[1], theme.heat[0], theme.series[0])),
        scale=Normalize(-reach, reach),
        ticks=[-reach, -reach / 2, 0, reach / 2, reach],
        written=_points,
    )


def _draw(axes: Axes, panel: _Panel, forwards: Sequence[int], backwards: Sequence[int], theme: Theme) -> None:
    table = np.full((len(backwards), len(forwards)), np.nan)
    for (forward, backward), value in panel.values.items():
        table[backwards.index(backward), forwards.index(forward)] = value
    image = axes.imshow(table, cmap=panel.colours, norm=panel.scale, origin="lower", aspect="auto")
    axes.set_title(panel.title, color=theme.ink, fontsize=10.5, pad=8)
    axes.set_xticks(range(len(forwards)), list(map(str, forwards)))
    axes.set_yticks(range(len(backwards)), list(map(str, backwards)))
    axes.set_xlabel("toward the pivot at boundary f")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if max(len(forwards), len(backwards)) <= _MOST_NUMBERED:
        for (forward, backward), text in panel.labels.items():
            colour = readable_on(panel.colours(panel.scale(panel.values[forward, backward])))
            place = forwards.index(forward), backwards.index(backward)
            axes.text(*place, text, ha="center", va="center", color=colour, fontsize=8, linespacing=1.1)
    bar: Any = axes.figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.8, pad=0.03, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.ink, labelsize=8.5, length=0)
    bar.ax.xaxis.set_major_locator(FixedLocator(list(panel.ticks)))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.written(value)))


def _factor(ratio: float) -> str:
    return f"×{ratio:.2f}" if ratio < 10 else f"×{ratio:,.0f}" if ratio < 1e6 else "> ×10⁶"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0: no negative zero
