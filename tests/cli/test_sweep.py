"""``shifcon sweep`` as a user meets it, and what ``profile``, ``train`` and ``report`` make of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shifcon_fast.cli import app
from shifcon_fast.notices import warn_once
from shifcon_fast.space.area import propose_area
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.attaching import choose_area

Shifcon = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def shifcon(tmp_path_factory, tiny_checkpoint: Path, parallel_text) -> Shifcon:
    """Runs a command on the tiny model and its parallel text; (exit code, everything printed on one line)."""
    data = tmp_path_factory.mktemp("data") / "parallel.jsonl"
    rows = [dict(zip(parallel_text, row, strict=True)) for row in zip(*parallel_text.values(), strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(command: str, *more: object) -> tuple[int, str]:
        common = ("--model", tiny_checkpoint, "--parallel", data, "--quantization", "none")
        arguments = (command, *(() if command == "report" else common), *more)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return run


@pytest.fixture(scope="module")
def profiled(shifcon: Shifcon, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "space"
    assert shifcon("profile", "--output", folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def helpful(shifcon: Shifcon, profiled: Path) -> Path:
    """A profile with a sweep that recommends an area: its file says that retrieval rises from nothing."""
    folder = profiled.parent / "helpful"
    shutil.copytree(profiled, folder)
    command = ("sweep", "--space", folder, "--areas", "1:3,2:3", "--sentences", "8")
    code, text = shifcon(*command)
    assert code == 0, text
    assert "2 areas, measured in" in text
    value = json.loads((folder / "sweep.json").read_text())
    for scores in value["retrieval"].values():
        scores.update({name: [0.0] * len(shares) for name, shares in scores.items()})
    (folder / "sweep.json").write_text(json.dumps(value))
    code, text = shifcon(*command, "--max-perplexity-rise", "1e9")
    assert code == 0, text
    assert "next: shifcon train" in text
    return folder


@pytest.fixture(scope="module")
def harmful(profiled: Path, helpful: Path) -> Path:
    """The same measurements, where no rise is allowed."""
    folder = profiled.parent / "harmful"
    shutil.copytree(helpful, folder)
    value = json.loads((folder / "sweep.json").read_text())
    for area in value["areas"]:
        area["nll"]["sw"] = [nats + 1.0 for nats in value["nll"]["sw"]]
    (folder / "sweep.json").write_text(json.dumps({**value, "max_perplexity_rise": 0.1}))
    return folder


def arguments(folder: Path, **options: object) -> ShifConArguments:
    return ShifConArguments(output_dir=str(folder / "run"), report_to="none", **options)  # type: ignore[arg-type]


def test_a_sweep_lies_beside_the_space_and_decides(helpful: Path) -> None:
    assert {"sweep.json", "sweep.svg", "area.json", "language_space.json"} <= {
        p.name for p in helpful.iterdir()
    }
    area = json.loads((helpful / "area.json").read_text())
    assert (area["forward"], area["backward"]) in ((1, 3), (2, 3))
    assert area["reason"].startswith(f"Shift toward the pivot at boundary {area['forward']} and back")
    assert "with the shift on and no training" in area["reason"]
    assert choose_area(arguments(helpful), LanguageSpace.load(helpful)) == (area["forward"], area["backward"])


def test_the_same_command_goes_on_and_adds_areas(shifcon: Shifcon, helpful: Path, tmp_path: Path) -> None:
    folder = tmp_path / "space"
    shutil.copytree(helpful, folder)
    before = json.loads((folder / "sweep.json").read_text())
    code, text = shifcon("sweep", "--space", folder, "--sentences", "8", "--max-perplexity-rise", "1e9")
    assert code == 0, text
    after = json.loads((folder / "sweep.json").read_text())
    assert len(after["areas"]) == 3  # 1:2 is new
    assert [each for each in after["areas"] if each in before["areas"]] == before["areas"]
    refused = shifcon("sweep", "--space", folder, "--sentences", "9")
    assert refused[0] == 2
    assert "sentences 8 there, 9 here" in refused[1]


def test_training_refuses_an_area_that_no_measurement_supports(
    shifcon: Shifcon, harmful: Path, parallel_text, tmp_path: Path
) -> None:
    instructions = tmp_path / "instructions.jsonl"
    instructions.write_text('{"lang": "sw", "prompt": "Ada", "response": "Ben"}\n')
    output = tmp_path / "run"
    code, text = shifcon(
        "train", "--space", harmful, "--instructions", instructions, "--output", output, "--max-steps", "1"
    )
    assert code == 2
    assert "No area helps this model: train with `shift: false`" in text
    assert "perplexity rises by more than 10% at every area measured (2)" in text
    assert "--no-shift" in text
    assert "--forward and --backward" in text
    assert not output.exists()


def test_without_the_shift_or_with_an_area_training_goes_on(harmful: Path) -> None:
    space = LanguageSpace.load(harmful)
    assert choose_area(arguments(harmful, forward=1, backward=2), space) == (1, 2)
    proposed = propose_area(space).span
    assert choose_area(arguments(harmful, shift=False), space) == proposed  # for the contrastive pass
    with pytest.raises(ValueError, match=r"the sweep has 1\. Sweep with `--alpha 0.5`"):
        choose_area(arguments(harmful, alpha=0.5), space)


def test_an_area_that_is_guessed_is_said(
    helpful: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guessed = "are guessed from the distance of the subspaces"
    measured = LanguageSpace.load(helpful)
    warn_once.cache_clear()
    choose_area(arguments(helpful), measured)
    choose_area(arguments(helpful, forward=1, backward=2), measured)
    assert guessed not in caplog.text
    folder = tmp_path / "space"
    shutil.copytree(helpful, folder, ignore=shutil.ignore_patterns("sweep.json"))
    unmeasured = LanguageSpace.load(folder)
    choose_area(arguments(helpful, forward=1, backward=2), unmeasured)
    choose_area(arguments(helpful, shift=False, w_mcl=0.0), unmeasured)
    assert guessed not in caplog.text
    area = choose_area(arguments(helpful), unmeasured)
    choose_area(arguments(helpful), unmeasured)
    assert area == propose_area(unmeasured).span
    assert caplog.text.count(f"{area[0]} and {area[1]} {guessed}") == 1


def test_the_report_shows_the_sweep(shifcon: Shifcon, harmful: Path) -> None:
    assert shifcon("report", harmful)[0] == 0
    page = (harmful / "report.html").read_text(encoding="utf-8")
    assert "What the shift does, by area" in page
    assert "No area is recommended." in page
    assert page.count("<picture>") == 2


def test_profiling_anew_says_what_becomes_of_the_sweep(
    shifcon: Shifcon, harmful: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "space"
    shutil.copytree(harmful, folder)
    code, text = shifcon("profile", "--output", folder)  # the same vectors again
    assert code == 0
    assert "No area helps this model" in text
    assert json.loads((folder / "area.json").read_text())["forward"] is None
    code, text = shifcon("profile", "--output", folder, "--languages", "en,sw")
    assert code == 0
    assert "sweep.json is of an earlier language space: sweep again with --overwrite" in text
    assert json.loads((folder / "area.json").read_text())["forward"] is not None
    code, text = shifcon("sweep", "--space", folder)
    assert code == 2
    assert "vectors_sha256" in text


def test_a_sweep_elsewhere_says_how_training_finds_it(
    shifcon: Shifcon, profiled: Path, tmp_path: Path
) -> None:
    code, text = shifcon(
        *(
            "sweep",
            "--space",
            profiled,
            "--output",
            tmp_path,
            "--areas",
            "1:2",
            "--alpha",
            "0.5,1",
            "--sentences",
            "4",
        )
    )
    assert code == 0, text
    assert "copy sweep.json there" in text
    assert {p.name for p in tmp_path.iterdir()} == {
        *("sweep.json", "area.json", "sweep-alpha-0.5.svg", "sweep-alpha-1.svg"),
    }
    assert not (profiled / "sweep.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--areas", "1-2"], "--areas: got '1-2'; wanted pairs forward:backward"),
        (["--areas", "1:2:3"], "--areas: got"),
        (["--areas", "1:9"], "got 1:9; wanted 1 <= forward < backward <= 3"),
        (["--alpha", "half"], "--alpha: got 'half'"),
        (["--languages", "en,xx"], "'xx'"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_arguments_are_refused(shifcon: Shifcon, profiled: Path, more: list[str], message: str) -> None:
    code, text = shifcon("sweep", "--space", profiled, *more)
    assert code == 2
    assert message in text
    assert not (profiled / "sweep.json").exists()
