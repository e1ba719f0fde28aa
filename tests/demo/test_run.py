"""The demo from end to end on a micro world: what it writes, how it goes on after a stop, what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from shifcon_fast.demo import stages
from shifcon_fast.demo.pretrain import PretrainSettings
from shifcon_fast.demo.run import run_demo
from shifcon_fast.demo.settings import BASELINE, SHIFCON, DemoSettings
from shifcon_fast.demo.world import WorldSettings
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.evaluation.system_comparison import SystemComparison

MICRO = DemoSettings(
    world=WorldSettings(seed=4, stated=3, english_only=3, parallel=6),
    pretrain=PretrainSettings(hidden=64, intermediate=64, blocks=4, heads=2, tokens=6_000, batch_tokens=256),
    training={
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "contrastive_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    },
    lora_rank=2,
)


def run_micro(root, output, jobs=1) -> str:
    return run_demo(output, seeds=1, settings=MICRO, cache=root / "cache", jobs=jobs, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    return root, run_micro(root, root / "out")


def test_the_comparison_holds_every_system_question_and_language(finished) -> None:
    root, _ = finished
    comparison = SystemComparison.load(root / "out" / "comparison.json")
    assert comparison.systems == ["before", BASELINE, SHIFCON]
    assert comparison.languages == ["en", "de", "sw", "tr"]
    assert comparison.groups == ["seen only in English", "seen in every language"]
    for seeds in comparison.outcomes.values():
        for languages in seeds.values():
            assert {code: len(outcomes) for code, outcomes in languages.items()} == dict.fromkeys(
                languages, 24
            )


def test_plain_and_shifcon_saw_the_same_steps_and_only_one_the_contrastive_loss(finished) -> None:
    root, _ = finished
    logs = SystemComparison.load(root / "out" / "comparison.json").logs
    plain, shifcon = logs[BASELINE]["1"], logs[SHIFCON]["1"]
    assert [row["step"] for row in plain] == [row["step"] for row in shifcon] == [1, 2, 3]
    assert not any("loss_contrastive" in row for row in plain)
    assert all(row["loss_contrastive"] > 0 for row in shifcon)


def test_the_shifcon_run_was_evaluated_shifted_and_the_plain_one_not(finished) -> None:
    root, _ = finished
    area = json.loads((root / "out" / "space" / "area.json").read_text())
    shifcon = EvaluationResult.load(root / "out" / "runs" / "ShifCon-QLoRA-seed1")
    assert shifcon.mode == "shifted"
    assert (shifcon.area["forward"], shifcon.area["backward"]) == (area["forward"], area["backward"])
    assert EvaluationResult.load(root / "out" / "runs" / "plain-QLoRA-seed1").mode == "unshifted"
    assert EvaluationResult.load(root / "out" / "before").mode == "unshifted"


def test_the_report_says_what_came_out(finished) -> None:
    root, text = finished
    page = (root / "out" / "report.html").read_text("utf-8")
    for wanted in (
        "ShifCon QLoRA",
        "plain QLoRA",
        "seen only in English",
        "The world",
        "Layer area",
        "data:image",
    ):
        assert wanted in page
    assert "points against plain QLoRA" in text
    assert re.search(r"  ShifCon QLoRA +[\d.]+ % +[\d.]+ %  [+−][\d.]+ points \[", text)
    assert text.endswith(str(root / "out" / "report.html"))


def test_running_again_trains_and_evaluates_nothing(finished, monkeypatch) -> None:
    root, text = finished
    for name in ("load_quantized", "evaluate", "estimate_space", "ShifConTrainer"):
        monkeypatch.setattr(stages, name, lambda *args, **kwargs: pytest.fail("done again"))
    assert run_micro(root, root / "out") == text


def test_an_interrupted_demo_goes_on_and_ends_the_same(finished, tmp_path, monkeypatch) -> None:
    """Between the training and the evaluation of the last run, with everything else there."""
    root, text = finished
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    for name in ("report.html", "comparison.json"):
        (out / name).unlink()
    shutil.rmtree(out / "runs" / "ShifCon-QLoRA-seed1")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_micro(root, out)
    assert not (out / "report.html").exists()
    with monkeypatch.context() as patch:
        for name in ("estimate_space", "ShifConTrainer"):
            patch.setattr(stages, name, lambda *args, **kwargs: pytest.fail("done again"))
        assert run_micro(root, out).splitlines()[:-1] == text.splitlines()[:-1]


def contents(folder) -> dict[str, bytes]:
    """The files whose bytes the arithmetic decides: no times, no paths."""
    names = (
        "model.safetensors",
        "adapter_model.safetensors",
        "language_space.safetensors",
        "comparison.json",
    )
    return {str(file.relative_to(folder)): file.read_bytes() for name in names for file in folder.rglob(name)}


@pytest.mark.slow("starts processes, each of which imports everything")
def test_side_by_side_gives_the_same_bits(finished, tmp_path) -> None:
    root, text = finished
    again = run_micro(tmp_path, tmp_path / "out", jobs=2)
    assert again.splitlines()[:-1] == text.splitlines()[:-1]
    assert contents(tmp_path / "cache") == contents(root / "cache") != {}
    found, expected = contents(tmp_path / "out"), contents(root / "out")
    assert len(found) >= 4
    assert found == expected


def test_a_folder_of_something_else_is_refused(finished, tmp_path) -> None:
    root, _ = finished
    with pytest.raises(ValueError, match="other settings"):
        run_demo(root / "out", seeds=1, settings=DemoSettings(), progress=False)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        run_demo(tmp_path, seeds=1, settings=MICRO, progress=False)
    with pytest.raises(ValueError, match="jobs: got 0"):
        run_demo(tmp_path / "new", jobs=0, settings=MICRO, progress=False)
    with pytest.raises(ValueError, match="seeds: got 0"):
        run_demo(tmp_path / "new", seeds=0, settings=MICRO, progress=False)


def test_the_demo_is_not_shown_in_the_world_its_settings_were_chosen_in() -> None:
    assert DemoSettings().world.seed != 1
    assert set(DemoSettings().systems) >= {BASELINE, SHIFCON}
