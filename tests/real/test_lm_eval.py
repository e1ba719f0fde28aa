"""A run of SmolLM2 in lm-evaluation-harness: scores and answers are ours, also through its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

import shifcon_fast as sf
from shifcon_fast.data.chat_template import end_of_turn
from shifcon_fast.data.cldr import cldr_rows
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.data.questions import Question, read_questions
from shifcon_fast.evaluation.exact_match import answer_questions
from shifcon_fast.evaluation.multiple_choice import measure_multiple_choice
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.training.run.run_folder import RunState, save_run
from shifcon_fast.training.weights.quantization import load_quantized

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from shifcon_fast.lm_eval_model import ShifConLM

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, smollm2: Path, _smollm2_once: Any, shifcon_data: Path
) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = load_quantized(smollm2, LoraConfig(r=4, target_modules="all-linear"), "none").eval()
    text = read_parallel(str(shifcon_data / "ntrex128.jsonl"), languages=["en", "sw"])
    few = {code: sentences[:16] for code, sentences in text.items()}
    tokenizer = _smollm2_once.tokenizer
    space = estimate_space(model, tokenizer, few, subspaces=False, progress=False)
    handle = sf.attach(model, space, 15, 20)
    save_run(folder, model, RunState(handle, tokenizer=tokenizer, end_of_turn=end_of_turn(tokenizer)))
    return folder


def measured(lm: Any, folder: Path, task: dict[str, Any], rows: list[dict[str, Any]], **options: Any) -> Any:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    (folder / "task.yaml").write_text(
        yaml.safe_dump({"dataset_path": "json", "dataset_kwargs": sources, "test_split": "test", **task})
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        lm, tasks=[task["task"]], task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )
    assert found is not None
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return found["results"][task["task"]], samples


def test_choices(run: Path, tmp_path: Path, open_smollm2: Any) -> None:
    asked = read_questions(cldr_rows(["sw"], split="dev"))[::20]
    task = {
        "task": "cldr_sw",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    rows = [
        {"question": each.text, "choices": list(each.choices), "gold": each.choices.index(str(each.answer))}
        for each in asked
    ]
    scores, samples = measured(ShifConLM(str(run), "sw", batch_size=4), tmp_path, task, rows)
    model = sf.load(run)
    ours = measure_multiple_choice(model, open_smollm2.tokenizer, asked, handle=model.shifcon)
    for sample, outcome in zip(samples, ours, strict=True):
        found = [float(response[0]) for response in sample["filtered_resps"]]
        assert found == pytest.approx(outcome.log_likelihoods, abs=5e-3)
    assert scores["acc,none"] == pytest.approx(sum(each.correct for each in ours) / len(ours))
    assert scores["acc_norm,none"] == pytest.approx(sum(each.correct_norm for each in ours) / len(ours))


def test_answers_through_the_chat_template(run: Path, tmp_path: Path, open_smollm2: Any) -> None:
    texts = ["Mji mkuu wa Kenya ni upi?", "2 + 2 ni ngapi?", "Say only: 7"]
    task = {
        "task": "direct_sw",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold|string}}",
        "generation_kwargs": {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match"}],
    }
    rows = [{"question": text, "gold": 7} for text in texts]
    _, samples = measured(
        ShifConLM(str(run), "sw", batch_size=3), tmp_path, task, rows, apply_chat_template=True
    )
    model = sf.load(run)
    asked = [Question(row, "sw", text, 7) for row, text in enumerate(texts)]
    ours = answer_questions(
        model, open_smollm2.tokenizer, asked, handle=model.shifcon, max_new_tokens=NEW_TOKENS
    )
    assert [sample["resps"][0][0].strip() for sample in samples] == [each.response for each in ours]
    assert all(each.response for each in ours)


def test_the_model_card_loads_it(
    run: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Through the chat template, with the base model under its folder's name."""
    (tmp_path / run.name).symlink_to(run)
    (tmp_path / smollm2.name).symlink_to(smollm2)
    monkeypatch.chdir(tmp_path)
    card = (run / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "apply_chat_template" in code
    exec(code.replace("max_new_tokens=64", "max_new_tokens=4"), {})
    assert capsys.readouterr().out.strip()
    assert str(smollm2) not in card
