"""Multiple choice on real models: batches and the cache change nothing; the gap that the method is for is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shifcon_fast.data.cldr import cldr_rows
from shifcon_fast.data.questions import Question, read_questions
from shifcon_fast.evaluation.choice_scores import choice_accuracy
from shifcon_fast.evaluation.multiple_choice import measure_multiple_choice


def naive(opened: Any, question: Question, delimiter: str) -> list[float]:
    """Σ log p of each choice's tokens, from one forward of the whole text each."""
    found = []
    start = len(opened.tokenizer(question.text)["input_ids"])
    for choice in question.choices:
        ids = torch.tensor([opened.tokenizer(question.text + delimiter + choice)["input_ids"]])
        with torch.no_grad():
            logits = opened.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
        found.append(sum(float(logits[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])))
    return found


@pytest.mark.parametrize("opened", ["open_smollm2", "open_gemma3"])
def test_scores_are_those_of_whole_texts(opened: str, request: pytest.FixtureRequest) -> None:
    real = request.getfixturevalue(opened)
    asked = read_questions(cldr_rows(["en", "sw", "th"], split="dev"))[::25]
    assert {question.language for question in asked} == {"en", "sw", "th"}
    for question, outcome in zip(
        asked, measure_multiple_choice(real.model, real.tokenizer, asked), strict=True
    ):
        wanted = naive(real, question, "" if question.language == "th" else " ")
        assert outcome.log_likelihoods == pytest.approx(wanted, abs=5e-3)


def test_smollm2_knows_official_languages_in_english_not_in_swahili(open_smollm2: Any) -> None:
    asked = read_questions(cldr_rows(["en", "sw"], split="dev", kinds=["language"]))
    found = choice_accuracy(measure_multiple_choice(open_smollm2.model, open_smollm2.tokenizer, asked))
    assert found["en"].estimate > 0.7
    assert found["sw"].estimate < found["en"].estimate - 0.2
