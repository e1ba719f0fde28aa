"""make bench: suites within their minutes, tables from records, and ratios that have fallen."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``module(name)``: a module of benchmarks/, whatever else has its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def fetch(name: str) -> ModuleType:
        for own in ("document", "tables", "ratios", "bench", "levels", "ceilings", "timing"):
            monkeypatch.delitem(sys.modules, own, raising=False)
        return importlib.import_module(name)

    return fetch


# --- the page


def test_the_committed_page_is_what_the_committed_records_make(module: Any) -> None:
    document = module("document")
    page = document.PAGE.read_text(encoding="utf-8")
    assert document.filled(page) == page, "run make performance"


def test_another_record_makes_another_page(module: Any, tmp_path: Path) -> None:
    document = module("document")
    page = document.PAGE.read_text(encoding="utf-8")
    results = tmp_path / "results"
    shutil.copytree(BENCHMARKS / "results" / "cpu", results / "cpu")
    record = json.loads((results / "cpu" / "run1.json").read_text(encoding="utf-8"))
    for bench in record["benchmarks"]:
        info = bench["extra_info"]
        if info.get("peer") == "ours" and info["case"] == "norm, one small call, 1x4096":
            info["ms"] /= 3
    (results / "cpu" / "run1.json").write_text(json.dumps(record), encoding="utf-8")
    changed = document.filled(page, results)
    assert "3.1 µs: 19.5 ×, 9.5" in changed
    assert "3.1 µs: 19.5 ×" not in page


@pytest.mark.parametrize("wrong", ["runs", "rums"])
def test_a_page_with_another_table_is_refused(module: Any, wrong: str) -> None:
    """A table twice, and one that nobody makes."""
    document = module("document")
    page = document.PAGE.read_text(encoding="utf-8")
    more = f"<!-- {wrong}: made by make performance -->\n<!-- end of {wrong} -->"
    with pytest.raises(LookupError, match="the page has"):
        document.filled(page + more)


def record(level: str, processor: str, ratios: dict[str, float], **also: Any) -> dict[str, Any]:
    """A record as pytest-benchmark writes it, of cases in turns."""
    rows = [
        {"case": case, "ms": 0.5, "times_as_long": {"eager": times}, "quartiles": {"eager": [1.0, 9.0]}}
        for case, times in ratios.items()
    ]
    about = {
        "level": level,
        "cpu": {"brand_raw": processor},
        "cuda": None,
        "threads": 2,
        "packages": {"torch": "2.13.0"},
        "environment": {},
    }
    return {"machine_info": about | also, "benchmarks": [{"extra_info": row} for row in rows]}


def test_a_listing_shows_every_row_and_says_what_was_not_measured(module: Any, tmp_path: Path) -> None:
    tables = module("tables")
    listing = tables.Listing("*/some.json", {"Case": lambda row: row["case"], "eager": tables.times("eager")})
    assert listing(tmp_path).splitlines()[2] == "| *not measured* | *not measured* | *not measured* |"
    made = record(
        "AVX2", "Some(R) Processor", {"a": 2.5, "b": 3.0}, environment={"ATEN_CPU_CAPABILITY": "avx2"}
    )
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "some.json").write_text(json.dumps(made), encoding="utf-8")
    link = "[Some, AVX2, held to it, 2 threads, torch 2.13.0](../benchmarks/results/some/some.json)"
    assert listing(tmp_path).splitlines()[2:] == [
        f"| a | 2.50 × (1.00–9.00) | {link} |",
        "| b | 3.00 × (1.00–9.00) | ″ |",
    ]


# --- ratios


def test_a_ratio_below_three_fifths_has_fallen(module: Any) -> None:
    ratios = module("ratios")
    committed = record("AVX2", "P", {"held": 10.0, "fallen": 10.0})
    compared = ratios.compare(record("AVX2", "P", {"held": 6.1, "fallen": 5.9, "new": 1.0}), committed)
    assert [(each.case, each.fallen) for each in compared] == [("held", False), ("fallen", True)]
    assert str(compared[1]) == "FALLEN fallen: 5.90 x, committed 10.00 x"
    with pytest.raises(LookupError, match="not measured: fallen"):
        ratios.compare(record("AVX2", "P", {"held": 6.1}), committed)


def test_ratios_of_the_same_level_are_compared_and_another_processor_is_said(
    module: Any, tmp_path: Path
) -> None:
    ratios = module("ratios")
    for folder, level, processor in (("a", "AVX2", "P"), ("b", "AVX2", "Q"), ("c", "AVX-512", "P")):
        (tmp_path / folder).mkdir()
        text = json.dumps(record(level, processor, {"x": 1.0}))
        (tmp_path / folder / "check.json").write_text(text, encoding="utf-8")
    assert ratios.committed_for(record("AVX2", "Q", {}), "check", tmp_path) == (
        tmp_path / "b/check.json",
        None,
    )
    file, said = ratios.committed_for(record("AVX2", "R", {}), "check", tmp_path)
    assert file == tmp_path / "a/check.json"
    assert said == "this is a R, the committed ratios are those of a P at the level AVX2"
    with pytest.raises(LookupError, match="at the level 'baseline'"):
        ratios.committed_for(record("baseline", "P", {}), "check", tmp_path)


def avx2_here() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and " avx2 " in flags.read_text(encoding="utf-8")


@pytest.mark.slow("measures operators against eager PyTorch and compares with the committed ratios")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["check", "check_avx2"])
def test_no_ratio_has_fallen(module: Any, name: str, tmp_path: Path) -> None:
    bench, ratios = module("bench"), importlib.import_module("ratios")
    if name == "check_avx2" and not avx2_here():
        pytest.skip("the processor has no AVX2 to be held to")
    suite = next(suite for suite in bench.SUITES if suite.name == name)
    problem = bench.run(suite, tmp_path, 500, smoke=False)
    assert problem is None
    made = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    try:
        file, said = ratios.committed_for(made, name)
    except LookupError as error:
        pytest.skip(str(error))
    compared = ratios.compare(made, json.loads(file.read_text(encoding="utf-8")))
    print(said or f"compared with {file.name} of the same processor", *compared, sep="\n")
    fallen = [str(each) for each in compared if each.fallen]
    assert not fallen, "\n".join([said or "the same processor", *fallen])


# --- suites


def suites(bench: ModuleType, folder: Path) -> None:
    """Three suites of our own: one that measures, one that fails, one that takes too long to be started."""
    (folder / "test_good.py").write_text(
        "def test_it(benchmark):\n    benchmark(lambda: None)\n", encoding="utf-8"
    )
    (folder / "test_bad.py").write_text("def test_it(benchmark):\n    assert False\n", encoding="utf-8")
    bench.FOLDER = folder
    bench.SUITES = (
        bench.Suite("good", ("test_good.py",), 0.5),
        bench.Suite("bad", ("test_bad.py",), 0.5),
        bench.Suite("long", ("test_good.py",), 100),
    )


def test_a_suite_without_a_whole_record_leaves_the_one_before(
    module: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench = module("bench")
    suites(bench, tmp_path)
    for name in ("bad", "long"):
        (tmp_path / f"{name}.json").write_text("before", encoding="utf-8")
    assert bench.main(["--minutes", "5", "--out", str(tmp_path)]) == 1
    said = capfd.readouterr().out
    assert "bad: NO RECORD: pytest ended with 1" in said
    assert "long: NO RECORD: it takes about 100 minutes, " in said
    assert "raise --minutes" in said
    assert json.loads((tmp_path / "good.json").read_text(encoding="utf-8"))["benchmarks"]
    assert [(tmp_path / f"{name}.json").read_text(encoding="utf-8") for name in ("bad", "long")] == [
        "before"
    ] * 2
    assert not list(tmp_path.glob("*.part.json"))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) Processor AVX-512 with BF16", "intel-xeon-avx-512-with-bf16"),
        ("AMD EPYC 9654 96-Core Processor AVX2", "amd-epyc-9654-avx2"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "intel-core-i7-8700"),
        ("../..", "unknown"),
    ],
)
def test_a_device_has_a_folder(module: Any, name: str, folder: str) -> None:
    assert module("bench").device_folder(name) == folder


@pytest.mark.slow("runs the suites of make bench, in small")
def test_every_suite_runs_in_small(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-P", str(BENCHMARKS / "bench.py"), "--smoke", "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in tmp_path.glob("*.json")}
    assert {
        "operators",
        "operators_avx2",
        "blocks",
        "step",
        "step_gemma3",
        "models",
        "models_1_thread",
        "interventions",
        "check",
        "check_avx2",
    } == records.keys()
    assert records["operators_avx2"]["machine_info"]["level"] in ("AVX2", "baseline")
