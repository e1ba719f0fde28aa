"""The commands on SmolLM2 and real text: profile, plain and ShifCon training, evaluation, comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from shifcon_fast.cli import app
from shifcon_fast.data.cldr import cldr_instructions, cldr_rows
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.evaluation.system_comparison import SystemComparison
from shifcon_fast.workflow.compare_runs import SYSTEMS_FILE

pytestmark = pytest.mark.timeout(900)  # a real model on a busy machine

LANGUAGES = ("en", "de", "sw")
SYSTEMS = {"plain": ("--no-shift", "--w-mcl", "0"), "shifcon": ("--forward", "10", "--backward", "20")}
SEEDS = (1, 2)


def shifcon(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, shifcon_data: Path) -> Path:
    """A folder with runs of both systems, two steps each, and what `evaluate` made of them."""
    folder = tmp_path_factory.mktemp("work")
    news = [json.loads(line) for line in (shifcon_data / "ntrex128.jsonl").open(encoding="utf-8")]
    parallel = [{code: row[code] for code in LANGUAGES} for row in news]
    files: dict[str, list[Any]] = {
        "profiled": parallel[:12],
        "pairs": sorted(parallel[200:400], key=lambda row: len(row["en"]))[:12],
        "held_out": parallel[500:502],
        "instructions": cldr_instructions(LANGUAGES, split="train", kinds=("language",))[:24],
        "questions": cldr_rows(LANGUAGES, split="dev", kinds=("language",))[:4],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    space, profiled = folder / "space", folder / "profiled.jsonl"
    shifcon("profile", "--model", smollm2, "--parallel", profiled, "--output", space, "--quantization", "nf4")
    for system, flags in SYSTEMS.items():
        for seed in SEEDS:
            run = folder / f"{system}-{seed}"
            shifcon(
                *("train", "--model", smollm2, "--space", space, "--output", run, "--seed", seed, *flags),
                *("--parallel", folder / "pairs.jsonl", "--instructions", folder / "instructions.jsonl"),
                *("--max-steps", 2, "--per-device-train-batch-size", 4, "--contrastive-batch-size", 4),
                *("--learning-rate", 1e-3, "--logging-steps", 1, "--save-strategy", "no"),
                *("--report-to", "none"),
            )
            shifcon(
                *("evaluate", "--model", run, "--parallel", folder / "held_out.jsonl"),
                *("--questions", folder / "questions.jsonl", "--output", run / "evaluation"),
            )
    return folder


def test_a_trained_run_is_shifted_and_its_pivot_is_not(work: Path) -> None:
    result = EvaluationResult.load(work / "shifcon-1" / "evaluation")
    assert result.area is not None
    assert (result.area["forward"], result.area["backward"]) == (10, 20)
    shifted, unshifted = (result.perplexity[mode] for mode in ("shifted", "unshifted"))
    assert shifted["en"].nll == unshifted["en"].nll
    for code in ("de", "sw"):
        assert abs(sum(shifted[code].nll) / sum(unshifted[code].nll) - 1) > 0.005
    log = json.loads((work / "shifcon-1" / "training_log.json").read_text(encoding="utf-8"))
    assert all("loss_contrastive" in step for step in log["steps"])
    assert "unshifted" in EvaluationResult.load(work / "plain-1" / "evaluation").perplexity


def test_compare_says_what_the_evaluations_hold(work: Path) -> None:
    given = [f"{system}={work / f'{system}-{seed}'}" for system in SYSTEMS for seed in SEEDS]
    said = shifcon("compare", *given, "--output", work / "compared")
    comparison = SystemComparison.load(work / "compared" / SYSTEMS_FILE)

    def right(system: str, seed: int) -> float:
        result = EvaluationResult.load(work / f"{system}-{seed}" / "evaluation")
        choices = result.multiple_choice[result.mode]
        return float(np.mean([each.correct for each in choices if each.language in ("de", "sw")]))

    differences = [right("shifcon", seed) - right("plain", seed) for seed in SEEDS]
    told = comparison.difference("shifcon", "plain", ["de", "sw"])
    assert told.estimate == pytest.approx(np.mean(differences))
    assert told.low <= told.estimate <= told.high
    assert "shifcon" in said
    page = (work / "compared" / "report.html").read_text(encoding="utf-8")
    assert "data:image/svg+xml" in page
    assert "shifcon against plain" in page
