"""The plots of how a step's cost grows show the medians, their spread and the products' bound."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "growth_plot.py"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("growth_plot", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(**curves: list[dict[str, object]]) -> dict[str, object]:
    return {"machine": {}, "size": "tiny", "curves": curves}


def test_a_panel_holds_medians_and_the_products_alone(plot: ModuleType) -> None:
    pairs = [
        {"at": 16, "seconds": [3.0, 3.4, 3.2], "flops": 30},
        {"at": 8, "seconds": [2.0, 2.0, 2.6], "flops": 20},
    ]
    figure = plot.draw([record(pairs=pairs, languages=[{"at": 1, "seconds": [2.0]}])])
    assert [panel.get_xlabel() for panel in figure.axes] == ["languages in the batch", "sentence pairs"]
    measured, products = figure.axes[1].lines[0], figure.axes[1].lines[-1]
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([8, 16], [2.0, 3.2])
    assert list(products.get_ydata()) == [2.0, 3.0]
    assert all(panel.get_ylim()[0] == 0 for panel in figure.axes)


def test_what_nobody_can_draw_is_refused(plot: ModuleType) -> None:
    with pytest.raises(ValueError, match="curves: got speed; wanted some of languages, boundaries"):
        plot.draw([record(speed=[{"at": 1, "seconds": [1.0]}])])
    with pytest.raises(ValueError, match="no record has any"):
        plot.draw([record()])


def test_the_script_writes_a_picture(
    plot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "growth.json"
    file.write_text(json.dumps(record(length=[{"at": 128, "seconds": [1.0, 2.0]}])), encoding="utf-8")
    out = tmp_path / "images" / "growth.png"
    monkeypatch.setattr(sys, "argv", ["growth_plot.py", str(file), "--out", str(out)])
    plot.main()
    assert out.read_bytes().startswith(b"\x89PNG")
