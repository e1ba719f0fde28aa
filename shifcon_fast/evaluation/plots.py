"""The report's pictures, as SVG or PNG bytes.

Drawn on :class:`matplotlib.figure.Figure` itself, without pyplot and its global state. Languages appear as codes
only, so that no font has to hold their scripts. Every picture comes in a light and a dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.plot_style import (
    LIGHT,
    WIDTH,
    Format,
    Theme,
    add_legend,
    new_figure,
    readable_on,
    to_bytes,
)
from shifcon_fast.extras import needed_for

with needed_for("a picture"):
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, PercentFormatter

Looks = dict[str, tuple[str, str]]
"""System → colour and mark."""

_MARKERS = "osD^vPX"
_MOST_NUMBERED = 10  # languages up to which a heat map's cells are numbered


def distance_plot(
    boundaries: Sequence[int],
    distances: Sequence[float],
    floor: Sequence[float],
    *,
    area: tuple[int, int] | None = None,
    split_distances: Sequence[float] | None = None,
    by_language: Mapping[str, Sequence[float]] | None = None,
    theme: Theme = LIGHT,
    file_format: Format = "svg",
) -> bytes:
    """Subspace distance to the pivot at each boundary, with its noise floor and the chosen area [f, b) shaded.

    Args:
        split_distances: distances between halves of the sentences: from as many as the floor, so comparable.
    """
    figure, (axes,) = new_figure(theme, 1, height=3.9)
    colour = theme.series[0]
    _shade_area(axes, area, theme)
    for values in (by_language or {}).values():
        axes.plot(boundaries, values, color=colour, alpha=0.35, linewidth=1)
    axes.plot(boundaries, distances, color=colour, linewidth=2.4, marker="o", markersize=4.5)
    axes.fill_between(boundaries, 0, floor, color=theme.muted, alpha=0.16, linewidth=0)
    axes.plot(boundaries, floor, color=theme.muted, linestyle=(0, (4, 2)), linewidth=1.6)
    if split_distances is not None:
        axes.plot(boundaries, split_distances, color=colour, linestyle=":", linewidth=1.8)
    axes.set_ylim(bottom=0)
    _label_ends(axes, boundaries, by_language or {}, theme.muted)
    axes.set_xlabel("boundary (entering block k)")
    axes.set_ylabel("subspace distance D to the pivot")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=17))
    handles: list[Any] = [
        Line2D([], [], color=colour, linewidth=2.4, marker="o", markersize=4.5, label="mean over languages"),
        Line2D([], [], color=theme.muted, linestyle=(0, (4, 2)), linewidth=1.6, label="noise floor"),
    ]
    if split_distances is not None:
        handles.insert(
            1, Line2D([], [], color=colour, linestyle=":", linewidth=1.8, label="mean, from halves")
        )
        handles[-1].set_label("noise floor, from halves")
    if by_language:
        handles.insert(1, Line2D([], [], color=colour, alpha=0.35, linewidth=1, label="one language"))
    if area is not None:
        handles.append(Patch(color=theme.shade, label=f"shifted area [{area[0]}, {area[1]})"))
    add_legend(figure, handles, theme)
    return to_bytes(figure, file_format)


def retrieval_matrix_plot(
    languages: Sequence[str],
    before: Sequence[Sequence[float | None]],
    after: Sequence[Sequence[float | None]] | None = None,
    *,
    titles: tuple[str, str] = ("unshifted", "shifted"),
    theme: Theme = LIGHT,
    file_format: Format = "svg",
) -> bytes:
    """Top-1 retrieval between all pairs of languages, before and after, on one scale from 0 to 100 %."""
    matrices = [before] if after is None else [before, after]
    side = WIDTH / 2 * 0.86
    figure, all_axes = new_figure(
        theme, len(matrices), height=side + 0.5, width=WIDTH if after else WIDTH * 0.6
    )
    colours = LinearSegmentedColormap.from_list("heat", theme.heat).with_extremes(bad=theme.grid)
    for axes, matrix, title in zip(all_axes, matrices, titles, strict=False):
        values = np.array([[math.nan if v is None else v for v in row] for row in matrix], dtype=float)
        image = axes.imshow(values, cmap=colours, vmin=0, vmax=1)
        axes.set_title(title, color=theme.ink, fontsize=11, pad=8)
        axes.set_xticks(range(len(languages)), languages)
        axes.set_yticks(range(len(languages)), languages)
        axes.set_xlabel("candidates in")
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(languages) <= _MOST_NUMBERED:
            for (row, column), value in np.ndenumerate(values):
                if not math.isnan(value):
                    text = readable_on(colours(value))
                    axes.text(
                        column, row, f"{100 * value:.0f}", ha="center", va="center", color=text, fontsize=9
                    )
    all_axes[0].set_ylabel("query in")
    bar = figure.colorbar(image, ax=list(all_axes), shrink=0.72, pad=0.02, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.ink, labelsize=9, length=0)
    return to_bytes(figure, file_format)


def retrieval_by_boundary_plot(
    boundaries: Sequence[int],
    measures: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    *,
    area: tuple[int, int] | None = None,
    theme: Theme = LIGHT,
    file_format: Format = "svg",
) -> bytes:
    """One panel a measure: each language thin, their mean bold, one colour a mode.

    Args:
        measures: title of the panel → mode (``unshifted``, ``shifted``) → language → shares by boundary.
    """
    figure, all_axes = new_figure(theme, len(measures), height=3.6, share_y=True)
    colours = {"unshifted": theme.muted, "shifted": theme.series[0]}
    shown = list(dict.fromkeys(mode for modes in measures.values() for mode in modes))
    for axes, (title, modes) in zip(all_axes, measures.items(), strict=True):
        _shade_area(axes, area, theme)
        for mode, languages in modes.items():
            for values in languages.values():
                axes.plot(boundaries, values, color=colours[mode], linewidth=0.9, alpha=0.4)
            mean = np.mean([list(values) for values in languages.values()], axis=0)
            axes.plot(boundaries, mean, color=colours[mode], linewidth=2.6, marker="o", markersize=4)
        axes.set_title(title, color=theme.ink, fontsize=11)
        axes.set_xlabel("boundary (entering block k)")
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    all_axes[0].set_ylabel("sentences found")
    handles: list[Any] = [
        Line2D([], [], color=colours[mode], linewidth=2.6, marker="o", markersize=4, label=f"{mode}, mean")
        for mode in shown
    ]
    handles.append(Line2D([], [], color=theme.muted, linewidth=0.9, alpha=0.6, label="one language"))
    if area is not None:
        handles.append(Patch(color=theme.shade, label=f"shifted area [{area[0]}, {area[1]})"))
    add_legend(figure, handles, theme)
    return to_bytes(figure, file_format)


def loss_plot(
    logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    *,
    systems: Sequence[str] = (),
    theme: Theme = LIGHT,
    file_format: Format = "svg",
) -> bytes:
    """Training curves, the generation loss and the contrastive loss in panels of their own.

    Args:
        logs: system → one training log for each seed; a log is a list of ``{"step": …, "loss_generation": …,
            "loss_contrastive": …}``. A loss that no log has gets no panel. Runs are drawn thin, smoothed (over a
            twentieth of the run) and averaged over seeds bold.
        systems: as for :func:`accuracy_plot`.
    """
    panels = {
        key: title
        for key, title in (
            ("loss_generation", "generation loss"),
            ("loss_contrastive", "contrastive loss (MCL)"),
        )
        if any(_series(log, key)[0] for runs in logs.values() for log in runs)
    }
    if not panels:
        raise ValueError(
            "logs hold neither 'loss_generation' nor 'loss_contrastive'; there is nothing to draw"
        )
    looks = _looks(systems or list(logs), theme)
    figure, all_axes = new_figure(
        theme, len(panels), height=3.4, width=WIDTH if len(panels) > 1 else WIDTH * 0.65
    )
    for axes, (key, title) in zip(all_axes, panels.items(), strict=True):
        for name, runs in logs.items():
            colour, _ = looks[name]
            curves = [(steps, values) for steps, values in (_series(log, key) for log in runs) if steps]
            for steps, values in curves:
                axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.22)
            if curves:
                shortest = min(len(steps) for steps, _ in curves)
                mean = np.mean([_smooth(values)[:shortest] for _, values in curves], axis=0)
                axes.plot(curves[0][0][:shortest], mean, color=colour, linewidth=2.1)
        axes.set_title(title, color=theme.ink, fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    all_axes[0].set_ylabel("nats")
    if len(logs) > 1:
        lines = [Line2D([], [], color=looks[name][0], linewidth=2.1, label=name) for name in logs]
        add_legend(figure, lines, theme)
    return to_bytes(figure, file_format)


def accuracy_plot(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    *,
    ylabel: str = "right answers",
    systems: Sequence[str] = (),
    theme: Theme = LIGHT,
    file_format: Format = "svg",
) -> bytes:
    """Accuracy by language with intervals, one mark a system; one panel a group of questions.

    Args:
        panels: title → system → language → interval of a share (0 … 1).
        systems: all systems of the report, in order: it gives each its colour and mark, the same in every picture.
    """
    figure, all_axes = new_figure(theme, len(panels), height=3.8, share_y=True)
    drawn = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    looks = {name: look for name, look in _looks(systems or drawn, theme).items() if name in drawn}
    languages = list(dict.fromkeys(c for panel in panels.values() for s in panel.values() for c in s))
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=True):
        _marks(axes, looks, languages, panel, theme)
        axes.set_title(title, color=theme.ink, fontsize=11)
        axes.set_ylim(-0.02, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    all_axes[0].set_ylabel(ylabel)
    add_legend(figure, _mark_handles(looks), theme)
    return to_bytes(figure, file_format)


def difference_plot(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    *,
    ylabel: str,
    systems: Sequence[str] = (),
    theme: Theme = LIGHT,
    file_format: Format = "svg",
) -> bytes:
    """Differences of shares by language, in points, with intervals around them and a line at zero.

    Args:
        panels: title → system → language → interval of a difference (−1 … 1).
        systems: as for :func:`accuracy_plot`.
    """
    figure, all_axes = new_figure(theme, len(panels), height=3.8, share_y=True)
    drawn = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    looks = {name: look for name, look in _looks(systems or drawn, theme).items() if name in drawn}
    languages = list(dict.fromkeys(c for panel in panels.values() for s in panel.values() for c in s))
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=True):
        axes.axhline(0, color=theme.ink, linewidth=1.1)
        points = {
            name: {c: Interval(100 * i.estimate, 100 * i.low, 100 * i.high) for c, i in found.items()}
            for name, found in panel.items()
        }
        _marks(axes, looks, languages, points, theme)
        axes.set_title(title, color=theme.ink, fontsize=11)
    all_axes[0].set_ylabel(ylabel)
    add_legend(figure, _mark_handles(looks), theme)
    return to_bytes(figure, file_format)


def forest_plot(
    differences: Mapping[str, Mapping[str, Interval]],
    *,
    xlabel: str,
    theme: Theme = LIGHT,
    file_format: Format = "svg",
) -> bytes:
    """One row a system: its differences to the baseline with their intervals, and a line at zero.

    Args:
        differences: what was measured (the weak languages, the pivot) → system → interval (−1 … 1).
    """
    systems = list(dict.fromkeys(name for found in differences.values() for name in found))
    figure, (axes,) = new_figure(theme, 1, height=1.3 + 0.42 * len(systems))
    looks = _looks(list(differences), theme)
    axes.axvline(0, color=theme.ink, linewidth=1.1)
    for place, (name, found) in enumerate(differences.items()):
        colour, marker = looks[name]
        y = [
            row + (place - (len(differences) - 1) / 2) * 0.26
            for row, system in enumerate(systems)
            if system in found
        ]
        x = [100 * each.estimate for each in found.values()]
        error = [
            [100 * (each.estimate - each.low) for each in found.values()],
            [100 * (each.high - each.estimate) for each in found.values()],
        ]
        axes.errorbar(x, y, xerr=error, fmt=marker, color=colour, markersize=6, elinewidth=1.8, capsize=0)
    axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    add_legend(figure, _mark_handles(looks), theme)
    return to_bytes(figure, file_format)


def _marks(
    axes: Axes,
    looks: Looks,
    languages: Sequence[str],
    panel: Mapping[str, Mapping[str, Interval]],
    theme: Theme,
) -> None:
    spread = min(0.15, 0.72 / len(looks))
    for index, (name, (colour, marker)) in enumerate(looks.items()):
        found = panel.get(name, {})
        x = [
            languages.index(code) + (index - (len(looks) - 1) / 2) * spread
            for code in languages
            if code in found
        ]
        shown = [found[code] for code in languages if code in found]
        if not shown:
            continue
        y = np.array([interval.estimate for interval in shown])
        error = [
            np.maximum(y - [i.low for i in shown], 0),
            np.maximum(np.array([i.high for i in shown]) - y, 0),
        ]
        axes.errorbar(
            x,
            y,
            yerr=error,
            fmt=marker,
            color=colour,
            markersize=5.5,
            elinewidth=1.6,
            capsize=0,
        )
    for boundary in range(1, len(languages)):
        axes.axvline(boundary - 0.5, color=theme.grid, linewidth=0.8)
    axes.grid(axis="x", visible=False)
    axes.set_xticks(range(len(languages)), languages)
    axes.set_xlim(-0.5, len(languages) - 0.5)


def _mark_handles(looks: Looks) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=name)
        for name, (colour, marker) in looks.items()
    ]


def _looks(systems: Sequence[str], theme: Theme) -> Looks:
    """A colour and a mark for each system, by its place."""
    return {
        name: (theme.series[place % len(theme.series)], _MARKERS[place % len(_MARKERS)])
        for place, name in enumerate(systems)
    }


def _shade_area(axes: Axes, area: tuple[int, int] | None, theme: Theme) -> None:
    """From the middle before the first boundary of [f, b) to the middle behind the last."""
    if area is not None:
        axes.axvspan(area[0] - 0.5, area[1] - 0.5, color=theme.shade, linewidth=0, zorder=0)


def _label_ends(axes: Axes, x: Sequence[int], curves: Mapping[str, Sequence[float]], colour: str) -> None:
    """Each curve's name behind its last point, moved apart vertically where names would overlap."""
    ends = sorted(
        (known[-1][1], known[-1][0], name)
        for name, y in curves.items()
        if (known := [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)])
    )
    low, high = axes.get_ylim()
    gap = 0.045 * (high - low)
    lowest = -math.inf
    for y, at, name in ends:
        lowest = max(y, lowest + gap)
        axes.annotate(
            name,
            (at, lowest),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            va="center",
        )


def _series(log: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    rows = [(int(row["step"]), float(row[key])) for row in log if row.get(key) is not None]
    return [step for step, _ in rows], [value for _, value in rows]


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Moving average over a twentieth of the run, centred; at the ends over what there is."""
    width = max(1, len(values) // 20) | 1
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")
