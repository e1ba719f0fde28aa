"""The experiment's runner: its order, its files, what it refuses. The runs themselves are for `make experiment`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome
from shifcon_fast.evaluation.perplexity import Perplexity
from shifcon_fast.evaluation.result import AttachedArea, EvaluationResult
from shifcon_fast.evaluation.retrieval import Retrieval, RetrievalScores

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "real_models"
MODEL = "gemma-3-270m"


@pytest.fixture(scope="module")
def experiment() -> dict[str, ModuleType]:
    """The modules of the folder, which are imported by their own names."""
    import importlib

    sys.path.insert(0, str(FOLDER))
    try:
        return {
            name: importlib.import_module(name)
            for name in ("arms", "stored", "texts", "run", "report", "one_run")
        }
    finally:
        sys.path.remove(str(FOLDER))


def evaluation(stored: ModuleType, arm: str, seed: int) -> EvaluationResult:
    """Answers by chance, better for shifcon in the weak languages."""
    random = np.random.default_rng([seed, len(arm)])
    skill = {"base": 0.3, "plain": 0.5}.get(arm, 0.9)
    choices = []
    for each in stored.questions("test" if seed < 101 else "dev"):
        gold = each.choices.index(str(each.answer))
        nats = -random.uniform(1, 9, len(each.choices))
        if each.language == "en" or random.random() < skill:
            nats[gold] = -0.5
        values = [float(value) for value in nats]
        choices.append(
            ChoiceOutcome(each.row, each.language, each.group, each.text, list(each.choices), gold, values)
        )
    area = (
        None if arm in ("base", "plain") else AttachedArea(forward=6, backward=12, alpha=1.0, recipe="stable")
    )
    modes = ["unshifted"] if area is None else ["unshifted", "shifted"]
    codes = list(dict.fromkeys(each.language for each in choices))
    scored = {code: Perplexity([4.25, 8.5], [2, 5]) for code in codes}
    retrieval = Retrieval(
        pivot="en",
        languages=codes,
        sentences=2,
        boundaries=[1],
        matrix_boundary=1,
        matrix=[[None] * len(codes)] * len(codes),
        scores={code: RetrievalScores([0.5], [0.5], [0.25]) for code in codes[1:]},
        duplicates=dict.fromkeys(codes, 0),
    )
    return EvaluationResult(
        model=MODEL,
        pivot="en",
        area=area,
        retrieval=dict.fromkeys(modes, retrieval),
        perplexity=dict.fromkeys(modes, scored),
        multiple_choice=dict.fromkeys(modes, choices),
    )


@pytest.fixture(scope="module")
def results(experiment: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    made_of = [("base", 0), ("plain", 1), ("plain", 2), ("plain", 3), ("shifcon", 1), ("shifcon", 3)]
    made_of += [("base", 101), ("plain", 101), ("afp", 101)]
    for arm, seed in made_of:
        known = {"model": MODEL, "arm": arm, "seed": seed, "training_seconds": 90.0}
        known["dose"] = {"sw": [0.25, 0.5]}
        if seed != 3:
            told = [True, False, None] if arm == "plain" else [True, True, None]
            known["continued"] = {"sw": [{"text": "ndiyo", "in_language": each} for each in told]}
        made = evaluation(experiment["stored"], arm, seed)
        experiment["stored"].write_run(
            experiment["stored"].result_file(folder, MODEL, arm, seed), made, known
        )
    return folder


def test_the_order_gives_the_primary_measure_first(experiment: dict[str, ModuleType]) -> None:
    arms = experiment["arms"]
    runs = arms.runs()
    assert len(set(runs)) == len(runs) == 2 * (1 + 5 + 5 + 3 * (len(arms.ARMS) - 2))
    assert [arm for _, arm, _ in runs[:6]] == ["base", "base", "plain", "shifcon", "plain", "shifcon"]
    made = {arm: arms.fingerprint(MODEL, arm) for arm in arms.ARMS | arms.CANDIDATES}
    assert len(set(made.values())) == len(made)
    assert set(arms.SEEDS["shifcon"]) == {1, 2, 3, 4, 5}


def test_every_arm_is_one_that_the_trainer_takes(experiment: dict[str, ModuleType], tmp_path: Path) -> None:
    from shifcon_fast.training.arguments import ShifConArguments

    arms = experiment["arms"]
    for arm in arms.ARMS | arms.CANDIDATES:
        options = arms.arguments(MODEL, arm)
        args = ShifConArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
        assert (args.forward, args.backward) == arms.AREAS[MODEL]
        assert args.learning_rate == arms.TRAINING["learning_rate"]
        assert {"w_gen", "w_mcl"} <= options.keys()  # not the recipe's, which may change


def test_the_search_has_territories_and_seeds_of_its_own(experiment: dict[str, ModuleType]) -> None:
    arms, questions = experiment["arms"], experiment["stored"].questions
    tried, reported = arms.search_runs(), arms.runs()
    assert {arms.split_for(seed) for _, _, seed in tried} == {"dev"}
    assert {arms.split_for(seed) for _, _, seed in reported} == {"test"}
    assert set(arms.CANDIDATES) <= {arm for _, arm, _ in tried}
    assert arms.CANDIDATES.keys() & arms.ARMS.keys() == set(arms.CHOSEN)
    dev, test = ({each.row for each in questions(split)} for split in ("dev", "test"))
    assert dev
    assert test
    assert not dev & test


def test_train_and_test_share_no_territory(experiment: dict[str, ModuleType], shifcon_data: Path) -> None:
    facts = experiment["texts"].instructions("plain", shifcon_data)
    both = experiment["texts"].instructions("translation", shifcon_data)
    assert both[::2] == facts
    prompts = experiment["texts"].prompts()
    assert [row["prompt"] for row in facts] == [
        each for row in zip(*prompts.values(), strict=True) for each in row
    ]
    assert sum(row["prompt"].startswith("Translate into") for row in both) == len(facts)
    asked = {
        each.text.splitlines()[0].partition(":")[2].strip() for each in experiment["stored"].questions("test")
    }
    told = " ".join(row["prompt"] for row in facts if row["lang"] == "en")
    english = [name for name in asked if name.isascii() and len(name) > 5]
    assert len(english) > 50
    assert [name for name in english if f" {name}?" in told] == []


def test_a_result_comes_back_as_it_was(experiment: dict[str, ModuleType], results: Path) -> None:
    found, known = experiment["stored"].read_run(results / MODEL / "shifcon-1.json")
    made = evaluation(experiment["stored"], "shifcon", 1)
    assert known["seed"] == 1
    ours, theirs = (each.multiple_choice["shifted"] for each in (made, found))
    assert [(a.row, a.language, a.choices, a.gold, a.correct) for a in ours] == [
        (b.row, b.language, b.choices, b.gold, b.correct) for b in theirs
    ]
    np.testing.assert_allclose(ours[3].log_likelihoods, theirs[3].log_likelihoods, atol=1e-4)
    assert found.perplexity["shifted"]["sw"] == made.perplexity["shifted"]["sw"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": 0}, "protocol is 0, that of protocol.md and arms.py 1"),
        ({"fingerprint": "x"}, "fingerprint is x"),
        ({"choices": {}}, "holds 0 answers; wanted those of"),
        ({"kind": "evaluation"}, "kind is 'evaluation'; wanted 'experiment run'"),
        ({"seed": 2}, "is of gemma-3-270m plain 2; wanted that of its name"),
    ],
)
def test_results_of_something_else_are_refused(
    experiment: dict[str, ModuleType], results: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    held = json.loads((results / MODEL / "plain-1.json").read_text(encoding="utf-8"))
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "plain-1.json").write_text(json.dumps({**held, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        experiment["stored"].read_runs(tmp_path, [(MODEL, "plain", 1)])


def test_arms_of_unequal_text_are_refused(
    experiment: dict[str, ModuleType],
    results: Path,
    shifcon_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = experiment["texts"].digest
    other = tmp_path / "data"
    shutil.copytree(shifcon_data, other)
    same = digest(shutil.copytree(shifcon_data, tmp_path / "same"))
    rows = (other / "ntrex128.jsonl").read_text(encoding="utf-8").splitlines()
    rows[0] = rows[1]
    (other / "ntrex128.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert same == digest(shifcon_data)
    assert digest(other) != digest(shifcon_data)

    mine = tmp_path / "results"
    shutil.copytree(results, mine)
    for arm, data in (("plain", shifcon_data), ("shifcon", other)):
        path = mine / MODEL / f"{arm}-1.json"
        held = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**held, "text": digest(data)}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"shifcon-1.json: was trained on and measured with other text"):
        experiment["report"].write(mine, tmp_path, tmp_path / "does-it-help.md")
    monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(mine), "--data", str(other)])
    with pytest.raises(SystemExit, match=r"plain-1.json: was trained on .* that of the data folder is"):
        experiment["run"].main()
    (mine / MODEL / "shifcon-1.json").unlink()
    held = experiment["stored"].read_runs(mine, experiment["arms"].runs())
    experiment["stored"].of_one_text(held)
    assert {arm for _, arm, _ in held} == {"base", "plain", "shifcon"}


def test_the_report_is_made_of_what_there_is(
    experiment: dict[str, ModuleType], results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment["report"], "IMAGES", tmp_path)
    document = tmp_path / "does-it-help.md"
    document.write_text((FOLDER.parents[1] / "docs" / "does-it-help.md").read_text(encoding="utf-8"))
    said = experiment["report"].write(results, tmp_path, document)
    assert f"{MODEL}: 6 of " in said
    text = document.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| shifcon | 2 |"))
    assert "points \\[" in row
    assert any(line.startswith("| afp | 1 |") for line in text.splitlines())
    assert "| shifcon | 1.00 | 1.00 | 0.25 | 100 % | – | 0.50 | 1.5 |" in text
    assert "| plain | 1.00 | 1.00 | 0.25 | 50 % | – | – | 1.5 |" in text
    before = (FOLDER.parents[1] / "docs" / "does-it-help.md").read_text(encoding="utf-8")
    for other in ("smollm2-135m-instruct", "smollm2-135m-instruct, the search"):
        kept, as_it_was = (
            page.partition(f"<!-- {other}: made by")[2].partition(f"<!-- end of {other} -->")[0]
            for page in (text, before)
        )
        assert kept
        assert kept == as_it_was
    again = experiment["report"].write(results, tmp_path, document)
    assert (said, text) == (again, document.read_text(encoding="utf-8"))
    assert (tmp_path / f"does_it_help_{MODEL}.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(ValueError, match="lacks base and plain"):
        experiment["report"].write(tmp_path / "empty", tmp_path, document)


def test_the_command_lists_and_refuses(
    experiment: dict[str, ModuleType],
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", "--list", "--results", str(results), *options])
        experiment["run"].main()
        return capsys.readouterr().out

    said = command("--models", MODEL, "--arms", "plain,shifcon")
    assert said.startswith("5 of 10 runs are done\n")
    assert f"missing: {MODEL} shifcon 2" in said
    assert command("--models", MODEL, "--arms", "plain,afp", "--search").startswith("2 of 2 runs are done\n")
    with pytest.raises(SystemExit, match="arms: got 'afp'; wanted some of base, plain"):
        command("--arms", "afp")
    with pytest.raises(SystemExit, match="arms: got 'magic'; wanted some of base, plain"):
        command("--arms", "magic")
