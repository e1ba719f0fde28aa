"""Pictures are drawn from the numbers they are given: what the axes hold is compared, not pixels."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from shifcon_fast.evaluation import plots
from shifcon_fast.evaluation.bootstrap import Interval
from shifcon_fast.evaluation.plot_style import DARK, LIGHT, readable_on


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of the plots made meanwhile."""
    figures: list[Figure] = []
    real = plots.to_bytes

    def keep(figure: Figure, file_format: plots.Format) -> bytes:
        figures.append(figure)
        return real(figure, file_format)

    monkeypatch.setattr(plots, "to_bytes", keep)
    return figures


def lines(axes) -> list[list[float]]:
    return [[float(y) for y in line.get_ydata()] for line in axes.get_lines()]


def test_distances_their_floor_and_the_area(drawn) -> None:
    svg = plots.distance_plot(
        [0, 1, 2, 3],
        [9.0, 5.0, 4.0, math.nan],
        [2.0, 2.0, 1.5, math.nan],
        area=(1, 3),
        split_distances=[9.5, 5.5, 4.5, math.nan],
        by_language={"de": [8.0, 4.0, 3.0, math.nan], "sw": [10.0, 6.0, 5.0, math.nan]},
    )
    axes = drawn[0].axes[0]
    assert [values[:3] for values in lines(axes)] == [
        [8, 4, 3],
        [10, 6, 5],
        [9, 5, 4],
        [2, 2, 1.5],
        [9.5, 5.5, 4.5],
    ]
    shaded = axes.patches[0]
    assert (shaded.get_x(), shaded.get_x() + shaded.get_width()) == (0.5, 2.5)
    assert {text.get_text() for text in axes.texts} == {"de", "sw"}
    assert drawn[0].legends[0].get_texts()[-1].get_text() == "shifted area [1, 3)"
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_both_matrices_share_one_scale(drawn) -> None:
    before, after = [[None, 0.1], [0.2, None]], [[None, 0.9], [1.0, None]]
    plots.retrieval_matrix_plot(["en", "sw"], before, after)
    images = [axes.images[0] for axes in drawn[0].axes if axes.images]
    assert [image.get_clim() for image in images] == [(0, 1), (0, 1)]
    assert images[1].get_array().filled(np.nan)[1, 0] == 1.0
    assert [t.get_text() for t in drawn[0].axes[0].texts] == ["10", "20"]
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["en", "sw"]


def test_retrieval_by_boundary_shows_each_language_and_their_mean(drawn) -> None:
    modes = {
        "unshifted": {"de": [0.2, 0.4], "sw": [0.0, 0.2]},
        "shifted": {"de": [0.2, 0.8], "sw": [0.0, 0.6]},
    }
    plots.retrieval_by_boundary_plot([0, 1], {"MEXA": modes}, area=(1, 2))
    expected = [[0.2, 0.4], [0, 0.2], [0.1, 0.3], [0.2, 0.8], [0, 0.6], [0.1, 0.7]]
    np.testing.assert_allclose(lines(drawn[0].axes[0]), expected)


def test_losses_have_panels_of_their_own(drawn) -> None:
    log = [{"step": i, "loss_generation": 2.0 - i, "loss_contrastive": 3.0} for i in range(2)]
    only_generation = [{"step": i, "loss_generation": 4.0} for i in range(3)]
    plots.loss_plot({"both": [log, log], "plain": [only_generation]})
    generation, contrastive = drawn[0].axes
    assert lines(generation) == [[2, 1], [2, 1], [2, 1], [4, 4, 4], [4, 4, 4]]
    assert lines(contrastive) == [[3, 3], [3, 3], [3, 3]]
    plots.loss_plot({"plain": [only_generation]})
    assert len(drawn[1].axes) == 1
    with pytest.raises(ValueError, match="neither 'loss_generation' nor 'loss_contrastive'"):
        plots.loss_plot({"plain": [[{"step": 1}]]})


def test_smoothing_is_a_centred_mean_over_a_twentieth() -> None:
    values = np.random.default_rng(0).normal(size=100)
    smooth = plots._smooth(values)
    assert smooth[50] == pytest.approx(values[48:53].mean())
    assert smooth[0] == pytest.approx(values[:3].mean())
    assert plots._smooth([3.0, 1.0]).tolist() == [3.0, 1.0]


def test_accuracies_carry_their_intervals_and_a_system_its_colour(drawn) -> None:
    intervals = {"en": Interval(0.9, 0.8, 0.95), "sw": Interval(0.4, 0.3, 0.5)}
    plots.accuracy_plot(
        {"all": {"plain": intervals, "ShifCon": intervals}}, systems=["x", "plain", "ShifCon"]
    )
    plots.difference_plot({"all": {"ShifCon": intervals}}, ylabel="points", systems=["x", "plain", "ShifCon"])
    bars = drawn[0].axes[0].containers
    assert [list(bar[0].get_ydata()) for bar in bars] == [[0.9, 0.4], [0.9, 0.4]]
    np.testing.assert_allclose(bars[0][2][0].get_segments()[1][:, 1], [0.3, 0.5])
    (difference,) = drawn[1].axes[0].containers
    assert list(difference[0].get_ydata()) == [90, 40]
    assert difference[0].get_color() == bars[1][0].get_color() == LIGHT.series[2]


def test_the_same_numbers_give_the_same_bytes() -> None:
    pictures = [plots.distance_plot([0, 1], [2.0, 1.0], [0.5, 0.5]) for _ in range(2)]
    assert pictures[0] == pictures[1]
    assert plots.distance_plot([0, 1], [2.0, 1.0], [0.5, 0.5], theme=DARK) != pictures[0]
    png = plots.distance_plot([0, 1], [2.0, 1.0], [0.5, 0.5], file_format="png")
    assert png.startswith(b"\x89PNG\r\n")


def test_numbers_are_readable_on_their_cell() -> None:
    assert readable_on((1.0, 1.0, 1.0, 1.0)) == "#101418"
    assert readable_on((0.05, 0.2, 0.35, 1.0)) == "#ffffff"
