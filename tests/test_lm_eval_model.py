"""Runs in lm-evaluation-harness: its scores are ours, and shifted."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig

import shifcon_fast as sf
from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.exact_match import answer_questions
from shifcon_fast.evaluation.multiple_choice import measure_multiple_choice
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.training.run.run_folder import RunState, save_run
from shifcon_fast.training.weights.quantization import load_quantized

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from shifcon_fast.lm_eval_model import ShifConLM, checked_language, run_command, with_our_model

LANGUAGE = "sw"
CHOICES = [
    Question(0, LANGUAGE, "Ada anaishi", "Roma", ("paka", "Roma", "mkate na samaki")),
    Question(1, LANGUAGE, "Ben ana paka", "mwekundu", ("mwekundu", "mzee wa Roma na")),
    Question(2, LANGUAGE, "paka wa Eva ni", "mzee", ("samaki", "anakula mkate na", "mzee")),
    Question(3, LANGUAGE, "Dina anakula mkate na", "paka", ("samaki", "paka", "Roma", "mzee ni")),
    Question(4, LANGUAGE, "Cem anaishi", "Roma", ("Roma", "mkate", "mzee na")),
]
ASKED = [
    "Ada ana 3 paka ?",
    "Ben anakula 4 samaki ?",
    "mkate wa Eva ni 7 ?",
    "Femi ?",
    "paka wa Cem",
    "Dina ana 1",
]
UNTIL = "samaki"
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Any],
    word_tokenizer: Any,
    parallel_text: dict[str, list[str]],
) -> Path:
    """A run whose base model likes to say digits."""
    base, folder = (tmp_path_factory.mktemp(name) for name in ("base", "run"))
    model = tiny_model("llama", hidden=64)
    digits = word_tokenizer.convert_tokens_to_ids([*"0123456789"])
    with torch.no_grad():
        model.lm_head.weight[digits] *= 2
    model.save_pretrained(base)
    word_tokenizer.save_pretrained(base)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    trained = load_quantized(base, lora, "none")
    space = estimate_space(trained, word_tokenizer, parallel_text, progress=False)
    handle = sf.attach(trained, space, 1, 3)
    save_run(folder, trained, RunState(handle, tokenizer=word_tokenizer))
    return folder


@pytest.fixture(scope="module")
def shifted(run: Path) -> ShifConLM:
    return ShifConLM(str(run), language=LANGUAGE, batch_size=2)


def measured(model: Any, folder: Path, task: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    """lm-eval's results for a task of a YAML file and a JSON Lines file, offline."""
    data = folder / f"{task['task']}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": sources, "test_split": "test"}
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")
    return simple_evaluate(
        model,
        tasks=[task["task"]],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )


CHOICE_TASK = {
    "task": "tiny_choices",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
CHOICE_ROWS = [
    {"question": each.text, "choices": list(each.choices), "gold": each.choices.index(str(each.answer))}
    for each in CHOICES
]


def log_likelihoods(results: Any) -> list[list[float]]:
    samples = sorted(results["samples"]["tiny_choices"], key=lambda sample: sample["doc_id"])
    return [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]


def flat(scores: list[list[float]]) -> list[float]:
    return [each for row in scores for each in row]


def test_choices_score_as_ours_do_and_the_shift_counts(
    run: Path, shifted: ShifConLM, word_tokenizer: Any, tmp_path: Path
) -> None:
    theirs = measured(shifted, tmp_path, CHOICE_TASK, CHOICE_ROWS)
    model = sf.load(run)
    ours = measure_multiple_choice(model, word_tokenizer, CHOICES, handle=model.shifcon)
    for found, outcome in zip(log_likelihoods(theirs), ours, strict=True):
        assert found == pytest.approx(outcome.log_likelihoods, abs=2e-4)
    scores = theirs["results"]["tiny_choices"]
    right = sum(outcome.correct for outcome in ours)
    assert scores["acc,none"] == right / len(ours)
    assert 0 < right < len(ours)
    assert scores["acc_norm,none"] == sum(outcome.correct_norm for outcome in ours) / len(ours)

    # The pivot's language is the unshifted model, whose log-likelihoods are others, and again ours.
    plain = ShifConLM(str(run), language="en")
    unshifted = log_likelihoods(measured(plain, tmp_path, CHOICE_TASK, CHOICE_ROWS))
    for found, outcome in zip(
        unshifted, measure_multiple_choice(model, word_tokenizer, CHOICES, handle=None), strict=True
    ):
        assert found == pytest.approx(outcome.log_likelihoods, abs=2e-4)
    differences = torch.tensor(flat(unshifted)) - torch.tensor(flat(log_likelihoods(theirs)))
    assert differences.abs().min() > 1e-3


def test_answers_and_exact_match_are_ours(
    run: Path, shifted: ShifConLM, word_tokenizer: Any, tmp_path: Path
) -> None:
    model = sf.load(run)
    asked = [Question(row, LANGUAGE, text, 0) for row, text in enumerate(ASKED)]

    def answer(questions: list[Question]) -> Any:
        return answer_questions(
            model,
            word_tokenizer,
            questions,
            handle=model.shifcon,
            max_new_tokens=NEW_TOKENS,
            stop_strings=[UNTIL],
        )

    said = answer(asked)
    assert {outcome.parsed for outcome in said} - {None}
    golds = [  # every other answer is right
        int(outcome.parsed or 0) if row % 2 else int(outcome.parsed or 0) + 1
        for row, outcome in enumerate(said)
    ]
    ours = answer([Question(q.row, LANGUAGE, q.text, g) for q, g in zip(asked, golds, strict=True)])
    task = {  # as mgsm_direct_* are
        "task": "tiny_direct_sw",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}\n",
        "doc_to_target": "{{gold|string}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": [UNTIL], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        "filter_list": [
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    }
    rows = [{"question": text, "gold": gold} for text, gold in zip(ASKED, golds, strict=True)]
    theirs = measured(shifted, tmp_path, task, rows)
    samples = sorted(theirs["samples"]["tiny_direct_sw"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0].strip() for sample in samples] == [outcome.response for outcome in ours]
    assert [bool(sample["exact_match"]) for sample in samples] == [outcome.correct for outcome in ours]
    share = theirs["results"]["tiny_direct_sw"]["exact_match,flexible-extract"]
    assert share == sum(outcome.correct for outcome in ours) / len(ours)
    assert 0 < share < 1


def test_answers_end_where_the_run_s_turns_do(run: Path, tmp_path: Path, word_tokenizer: Any) -> None:
    def generated(folder: Path) -> list[int]:
        lm = ShifConLM(str(folder), language=LANGUAGE)
        tokens = torch.tensor([word_tokenizer("Ada ana 3 paka ?\n")["input_ids"]])
        return lm._model_generate(tokens, 20, ["Adam"], attention_mask=torch.ones_like(tokens))[
            0, tokens.shape[1] :
        ].tolist()

    free = generated(run)
    ending = shutil.copytree(run, tmp_path / "ending")
    card = json.loads((ending / "shifcon.json").read_text())
    (ending / "shifcon.json").write_text(json.dumps({**card, "end_of_turn": [free[2]]}))
    assert generated(ending) == free[: free.index(free[2]) + 1]
    assert len(free) > 3


def test_a_language_is_wanted_and_known(run: Path) -> None:
    with pytest.raises(ValueError, match=r"language: none given.*en, de, sw, tr.*en, the pivot"):
        ShifConLM(str(run))
    with pytest.raises(ValueError, match=r"language: got 'yo'; wanted one of en, de, sw, tr"):
        ShifConLM(str(run), language="yo")
    assert ShifConLM(str(run), language="swh_Latn").language == LANGUAGE
    assert checked_language(float("nan"), ["en", "nan"], "en") == "nan"  # lm-eval reads the code as a number


def test_other_models_and_arguments_without_a_meaning_are_refused(run: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run; --model hf"):
        ShifConLM(str(tiny_checkpoint), language=LANGUAGE)
    with pytest.raises(ValueError, match=r"not attached"):
        ShifConLM(load_quantized(tiny_checkpoint, None, "none"), language=LANGUAGE)
    with pytest.raises(ValueError, match=r"peft, revision: not for --model shifcon"):
        ShifConLM(str(run), language=LANGUAGE, peft="adapter", revision="v2")
    with pytest.raises(ValueError, match=r"langage: unknown arguments"):
        ShifConLM(str(run), language=LANGUAGE, langage="sw")
    with pytest.raises(ValueError, match=r"pass base= if it moved"):
        ShifConLM(str(run), language=LANGUAGE, base=str(run / "moved"))


def test_a_shift_that_does_not_engage_is_an_error(run: Path) -> None:
    lm = ShifConLM(str(run), language=LANGUAGE)
    with (
        lm.model.shifcon.suspended(),
        pytest.raises(RuntimeError, match=r"did not engage in blocks \[1, 3\]"),
    ):
        lm._model_call(torch.tensor([[1, 20, 30]]))
    lm._model_call(torch.tensor([[1, 20, 30]]))


def test_requests_may_find_their_own_language(run: Path, shifted: ShifConLM, word_tokenizer: Any) -> None:
    lm = ShifConLM(str(run), language="auto")
    lm.model.shifcon.threshold = 0.0
    tokens = torch.tensor([word_tokenizer("Dina anakula mkate na samaki")["input_ids"]])
    logits = lm._model_call(tokens)
    assert [language for language, _ in lm.model.shifcon.detected] == [LANGUAGE]
    torch.testing.assert_close(logits, shifted._model_call(tokens))
    with pytest.raises(ValueError, match=r"wanted batch_size=1"):
        lm._model_call(tokens.repeat(2, 1))
    model = sf.load(run)
    model.shifcon.set_shift(replace(model.shifcon.shift, router=None))
    with pytest.raises(ValueError, match=r"no router"):
        ShifConLM(model, "auto", tokenizer=word_tokenizer)


def test_a_model_in_use_and_its_languages_side_by_side(
    run: Path, shifted: ShifConLM, word_tokenizer: Any
) -> None:
    """Two of them may share one attached model: each says its own language."""
    model, tokens = sf.load(run), torch.tensor([[1, 20, 30]])
    swahili, german = (ShifConLM(model, code, tokenizer=word_tokenizer) for code in (LANGUAGE, "de"))
    first, other = swahili._model_call(tokens), german._model_call(tokens)
    torch.testing.assert_close(first, shifted._model_call(tokens))
    assert not torch.allclose(first, other)
    assert model.shifcon.language is None


def test_runs_without_a_shift_are_measured_as_they_are(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(run, tmp_path / "plain")
    card = json.loads((folder / "shifcon.json").read_text())
    (folder / "shifcon.json").write_text(json.dumps({**card, "shift": False}))
    lm = ShifConLM(str(folder), language=LANGUAGE)
    assert "trained without the shift: it is measured unshifted" in caplog.text
    tokens = torch.tensor([[1, 20, 30]])
    torch.testing.assert_close(lm._model_call(tokens), ShifConLM(str(run), language="en")._model_call(tokens))


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        (["--tasks", "t"], ["run", "--model", "shifcon", "--tasks", "t"]),
        (["run", "--tasks", "t"], ["run", "--model", "shifcon", "--tasks", "t"]),
        (["run", "--model=hf", "--tasks", "t"], ["run", "--model=hf", "--tasks", "t"]),
        (["-M", "hf", "--tasks", "t"], ["-M", "hf", "--tasks", "t"]),
        (["--config", "file.yaml"], ["--config", "file.yaml"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        ([], ["run"]),
    ],
)
def test_the_command_s_default_is_our_model(given: list[str], passed_on: list[str]) -> None:
    assert with_our_model(given) == passed_on


def test_the_command_knows_the_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_tasks = functools.partial(TaskManager, include_defaults=False)  # without reading thousands of others
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own_tasks)
    data, output = tmp_path / "rows.jsonl", tmp_path / "results"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHOICE_ROWS), encoding="utf-8")
    sources = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    task = {**CHOICE_TASK, "dataset_path": "json", "dataset_kwargs": sources, "test_split": "test"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    run_command(
        [
            *("--model_args", f"pretrained={run},language={LANGUAGE}"),
            *("--tasks", str(tmp_path / "tiny.yaml"), "--output_path", str(output)),
        ]
    )
    (written,) = output.rglob("results*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "shifcon"
    assert results["config"]["shifcon_language"] == LANGUAGE
    assert results["config"]["shifcon_area"] == [1, 3]
    assert 0 < results["results"]["tiny_choices"]["acc,none"] < 1
    assert get_model("shifcon") is ShifConLM
