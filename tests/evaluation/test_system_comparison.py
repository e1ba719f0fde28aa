"""Systems from evaluations: what is compared, what is refused, and the command."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shifcon_fast.cli import app
from shifcon_fast.evaluation.exact_match import Outcome
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome
from shifcon_fast.evaluation.perplexity import Perplexity
from shifcon_fast.evaluation.result import AttachedArea, EvaluationResult
from shifcon_fast.evaluation.system_comparison import SystemComparison, compare_results

LANGUAGES = ("en", "de", "sw")
ROWS = 24


def result(name: str, seed: int, right: float, area: AttachedArea | None = None) -> EvaluationResult:
    """An evaluation that knows a share of everything in de and sw, and all in English."""
    random = np.random.default_rng([seed, round(100 * right)])
    choices, outcomes, perplexity = [], [], {}
    for code in LANGUAGES:
        for row in range(ROWS):
            knows = code == "en" or random.random() < right
            scores = [-1.0, -2.0] if knows else [-2.0, -1.0]
            group = "language" if row % 2 else "currency"
            choices.append(ChoiceOutcome(row, code, group, "Q", ["yes", "no"], 0, scores))
        outcomes.append(Outcome(0, code, "2 + 2?", "4", "4", "4", True, True))
        nll = [float(value) for value in random.uniform(2, 3, 6) * (1.2 - 0.2 * right)]
        perplexity[code] = Perplexity(nll, [3, 4, 5, 6, 7, 8])
    modes = ["unshifted"] if area is None else ["unshifted", "shifted"]
    return EvaluationResult(
        model=name,
        pivot="en",
        area=area,
        perplexity=dict.fromkeys(modes, perplexity),
        outcomes=outcomes,
        multiple_choice=dict.fromkeys(modes, choices),
    )


AREA = AttachedArea(forward=1, backward=3, alpha=1.0, recipe="stable")


@pytest.fixture(scope="module")
def results() -> dict[str, list[EvaluationResult]]:
    return {
        "base": [result("base", 0, 0.3)],
        "plain": [result("plain", seed, 0.4) for seed in (1, 2, 3)],
        "ShifCon": [result("ours", seed, 0.9, AREA) for seed in (1, 2, 3)],
        "control": [result("control", seed, 0.4, AREA) for seed in (1, 2)],
    }


def test_every_system_is_measured_on_the_questions_and_seeds_of_both(
    results: dict[str, list[EvaluationResult]],
) -> None:
    found = compare_results(results, "plain", before="base")
    assert found.contenders == ["ShifCon", "control"]
    assert found.groups == ["answers", "currency", "language"]
    weak = [each for each in found.outcomes["ShifCon"]["1"]["de"] if each.group == "language"]
    assert len(weak) == ROWS // 2
    change = found.difference("ShifCon", "plain", ["de", "sw"])
    by_hand = np.mean(
        [
            np.mean([o.correct for o in a.multiple_choice["shifted"] if o.language != "en"])
            - np.mean([o.correct for o in b.multiple_choice["unshifted"] if o.language != "en"])
            for a, b in zip(results["ShifCon"], results["plain"], strict=True)
        ]
    )
    assert change.estimate == pytest.approx(by_hand * ROWS / (ROWS + 1))  # one more question, right for both
    assert change.excludes_zero
    control = found.difference("control", "plain", ["de", "sw"])  # two seeds against three
    assert not control.excludes_zero
    assert found.difference("ShifCon", "plain", ["en"]).estimate == 0
    third = {**results, "control": {"3": results["ShifCon"][2]}}  # seeds by name: paired with the third
    ours, theirs = (
        compare_results(each, "plain") for each in (third, {**results, "control": results["ShifCon"][2:]})
    )
    assert ours.difference("control", "plain", ["sw"]) != theirs.difference("control", "plain", ["sw"])
    alone = {"plain": [results["plain"][2]], "control": [results["ShifCon"][2]]}
    assert ours.difference("control", "plain", ["sw"]) == compare_results(alone, "plain").difference(
        "control", "plain", ["sw"]
    )


def test_perplexities_are_compared_as_ratios(results: dict[str, list[EvaluationResult]]) -> None:
    found = compare_results(results, "plain", before="base")
    ratio = found.log_perplexity("ShifCon", "plain", ["de"])
    by_hand = np.mean(
        [
            math.log(a.perplexity["shifted"]["de"].value / b.perplexity["unshifted"]["de"].value)
            for a, b in zip(results["ShifCon"], results["plain"], strict=True)
        ]
    )
    assert ratio.estimate == pytest.approx(by_hand)
    both = found.log_perplexity("ShifCon", "plain", ["de", "sw"]).estimate
    each = [found.log_perplexity("ShifCon", "plain", [code]).estimate for code in ("de", "sw")]
    assert both == pytest.approx(sum(each) / 2)
    broken = replace(results["ShifCon"][0])
    broken.perplexity["shifted"]["de"].nll[0] = math.inf
    try:
        ruined = compare_results({**results, "ShifCon": [broken]}, "plain")
        assert ruined.log_perplexity("ShifCon", "plain", ["de"]).estimate == math.inf
    finally:
        broken.perplexity["shifted"]["de"].nll[0] = 2.0


def test_other_questions_pivots_and_tokens_are_refused(results: dict[str, list[EvaluationResult]]) -> None:
    plain = results["plain"][0]
    fewer = {mode: outcomes[1:] for mode, outcomes in plain.multiple_choice.items()}
    with pytest.raises(ValueError, match="short: other questions than base"):
        compare_results({**results, "short": [replace(plain, model="short", multiple_choice=fewer)]}, "plain")
    with pytest.raises(ValueError, match="its pivot is 'de', that of base 'en'"):
        compare_results({**results, "other": [replace(plain, pivot="de")]}, "plain")
    cut = {"unshifted": dict.fromkeys(LANGUAGES, Perplexity([1.0], [2]))}
    with pytest.raises(ValueError, match="the same sentences, cut into the same tokens"):
        compare_results({**results, "other": [replace(plain, perplexity=cut)]}, "plain")
    bare = replace(plain, outcomes=[], multiple_choice={})
    with pytest.raises(ValueError, match="no questions were asked"):
        compare_results({"a": [bare], "b": [bare]}, "a")
    unscored = compare_results({**results, "unscored": [replace(plain, perplexity={})]}, "plain")
    assert unscored.perplexity == {}


@pytest.fixture(scope="module")
def folders(
    results: dict[str, list[EvaluationResult]], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    root = tmp_path_factory.mktemp("evaluations")
    given = []
    for name, of_seeds in results.items():
        for seed, each in enumerate(of_seeds):
            folder = root / f"{name}-{seed}"
            each.save(folder / "evaluation" if name == "ShifCon" else folder)  # beside a run, or alone
            given.append(f"{name}={folder}")
    return given


def test_the_command(folders: list[str], tmp_path: Path) -> None:
    options = ["--output", str(tmp_path), "--baseline", "plain", "--before", "base"]
    done = CliRunner().invoke(app, ["compare", *folders, *options])
    assert done.exit_code == 0, done.output
    assert "over 3 seeds and the questions" in done.output
    table = {line.split()[0]: line for line in done.output.splitlines() if line.startswith("  ")}
    assert list(table) == ["base", "plain", "ShifCon", "control"]
    assert table["control"].count("within noise") == 2
    found = SystemComparison.load(tmp_path / "systems.json")
    assert found.baseline == "plain"
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (
        "ShifCon, control against plain",
        "mean of de, sw",
        "seeds",
        "forward",
    ):
        assert text in html
    assert html.count("<picture>") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}"], "got only base; wanted two systems or more"),
        (["{0}", "{0}"], "is there twice; wanted each folder once"),
        (["{0}", "{1}", "--baseline", "nothing"], "baseline: got 'nothing'; wanted one of base, plain"),
        (["{0}", "=folder"], "got '=folder'; wanted NAME=FOLDER, or a folder"),
        (["{0}", "x=nowhere"], "nowhere: no folder of `shifcon evaluate`"),
    ],
)
def test_what_cannot_be_compared(
    folders: list[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [each.format(*folders) for each in arguments]
    done = CliRunner().invoke(app, ["compare", *given, "--output", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert message in " ".join((done.output + str(done.exception or "")).split())
    assert not (tmp_path / "out").exists()
