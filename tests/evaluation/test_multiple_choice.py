"""Multiple choice against whole-sequence scoring, one choice at a time, and against the harness's definitions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.multiple_choice import ChoiceOutcome, measure_multiple_choice
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.estimate_space import estimate_space

QUESTIONS = [
    Question(0, "en", "Ada lives in", "Rome", ("Rome", "a red cat", "bread and fish and bread")),
    Question(1, "en", "the cat of Ben is old and the cat of Eva is", "old", ("old", "in Rome"), "cats"),
    Question(0, "sw", "Ada anaishi", "Roma", ("paka", "Roma", "mkate na samaki")),
    Question(2, "tr", "Ada", "ekmek", ("kedi", "ekmek")),
    Question(3, "de", "wohnt Ben in Rom ?", "Eva", ("Eva", "Ben", "Rom", "eine rote Katze")),
]


def naive(model: Any, tokenizer: Any, question: Question, extra: dict[str, Any]) -> list[float]:
    """Σ log p of the choice's tokens, from one forward of the whole text."""
    found = []
    for choice in question.choices:
        start = len(tokenizer(question.text)["input_ids"])
        ids = torch.tensor([tokenizer(f"{question.text} {choice}")["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, **extra).logits[0].double().log_softmax(dim=-1)
        found.append(sum(float(logits[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])))
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "bloom", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_and_the_cache_change_nothing(
    tiny_model: Callable[..., Any], word_tokenizer: Any, architecture: str, batch_size: int
) -> None:
    model = tiny_model(architecture)
    outcomes = measure_multiple_choice(model, word_tokenizer, QUESTIONS, batch_size=batch_size)
    for question, outcome in zip(QUESTIONS, outcomes, strict=True):
        wanted = naive(model, word_tokenizer, question, {})
        assert outcome.log_likelihoods == pytest.approx(wanted, abs=2e-4)
        assert (outcome.row, outcome.language, outcome.group) == (
            question.row,
            question.language,
            question.group,
        )
        assert outcome.choices[outcome.gold] == question.answer
        assert outcome.prompt == question.text


def test_no_logits_are_made_of_the_questions(tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2].numel()))
    measure_multiple_choice(model, word_tokenizer, QUESTIONS, batch_size=100)
    assert seen == [0, 14 * 6]  # 14 choices, the longest of 5 tokens, and the token before them


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "bloom"])
def test_each_row_is_shifted_by_its_own_language(
    tiny_model: Callable[..., Any], word_tokenizer: Any, parallel_text: Any, architecture: str
) -> None:
    model = tiny_model(architecture)
    space = estimate_space(model, word_tokenizer, parallel_text, subspaces=False, progress=False)
    plain = measure_multiple_choice(model, word_tokenizer, QUESTIONS)
    with attach(model, space, 1, 3) as handle:
        unshifted = measure_multiple_choice(model, word_tokenizer, QUESTIONS)
        for before, after in zip(plain, unshifted, strict=True):
            assert after.log_likelihoods == pytest.approx(before.log_likelihoods, abs=2e-4)
        shifted = measure_multiple_choice(model, word_tokenizer, QUESTIONS, handle=handle)
        for question, before, after in zip(QUESTIONS, plain, shifted, strict=True):
            extra = {"language_ids": handle.language_ids([question.language])}
            assert after.log_likelihoods == pytest.approx(
                naive(model, word_tokenizer, question, extra), abs=2e-4
            )
            changed = max(
                abs(a - b) for a, b in zip(before.log_likelihoods, after.log_likelihoods, strict=True)
            )
            assert (changed > 1e-2) == (question.language != "en")


def test_without_bos_the_first_token_may_be_the_whole_question(
    tiny_model: Callable[..., Any], word_tokenizer: Any
) -> None:
    model = tiny_model()
    bare = Bare(word_tokenizer)
    question = Question(0, "en", "Ada", "lives", ("lives", "has a cat"))
    long = Question(1, "en", "Ada lives in Rome and Ben", "lives", ("lives", "has a cat"))
    found = measure_multiple_choice(model, bare, [long, question])
    for asked, outcome in zip([long, question], found, strict=True):
        assert outcome.log_likelihoods == pytest.approx(naive(model, bare, asked, {}), abs=2e-4)


class Bare:
    """A tokenizer that adds no special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        return self._tokenizer(text, add_special_tokens=False)


def outcome(log_likelihoods: list[float], choices: list[str], gold: int) -> ChoiceOutcome:
    return ChoiceOutcome(0, "en", "", "?", choices, gold, log_likelihoods)


def test_normalised_by_characters() -> None:
    found = outcome([-3.0, -4.0], ["ab", "abcd"], 1)
    assert (found.chosen, found.correct) == (0, False)
    assert (found.chosen_norm, found.correct_norm) == (1, True)  # -1.5 and -1 a character
    assert outcome([-2.0, -2.0], ["ab", "cd"], 0).correct  # of equal ones the first


def test_delimiter_template_and_worked_examples(tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    model = tiny_model()
    asked = [
        Question(0, "en", "Ada lives", "in", ("in", "old")),
        Question(1, "ja", "Ada", "Ben", ("Ben", "Eva")),
    ]
    found = measure_multiple_choice(
        model,
        word_tokenizer,
        asked,
        prompt_template={"en": "{question} :", "ja": "{question}:"},
        few_shot={"en": [("Ben has", "a cat")], "ja": [("Eva", "Cem")]},
    )
    assert [item.prompt for item in found] == ["Ben has : a cat\n\nAda lives :", "Eva:Cem\n\nAda:"]
    spaced = measure_multiple_choice(model, word_tokenizer, asked[1:], delimiter={"ja": " "})
    joined = measure_multiple_choice(model, word_tokenizer, asked[1:])
    # without the space it is one unknown word: the border lies inside a token, so the choice is tokenised apart
    assert len(word_tokenizer("AdaBen")["input_ids"]) == 2
    wanted = naive(model, word_tokenizer, asked[1], {})
    assert spaced[0].log_likelihoods == pytest.approx(wanted, abs=2e-4)
    assert joined[0].log_likelihoods == pytest.approx(wanted, abs=2e-4)


def test_chat_template(tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %} : {% endif %}"
    )
    model = tiny_model()
    asked = [Question(0, "en", "Ada lives", "in Rome", ("in Rome", "old"))]
    found = measure_multiple_choice(model, tokenizer, asked, use_chat_template=True)[0]
    plain = measure_multiple_choice(model, word_tokenizer, asked, prompt_template="{question} :")[0]
    assert found.prompt == "<s> Ada lives  : "
    assert found.log_likelihoods == pytest.approx(plain.log_likelihoods, abs=2e-4)


def test_bad_input_is_named(tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    model = tiny_model()
    good = Question(0, "en", "Ada", "old", ("old", "in Rome"))
    with pytest.raises(ValueError, match=r"question 1 \(en\) has no choices"):
        measure_multiple_choice(model, word_tokenizer, [good, Question(1, "en", "Ada", "old")])
    with pytest.raises(ValueError, match="row 0 in 'en' twice"):
        measure_multiple_choice(model, word_tokenizer, [good, good])
    with pytest.raises(ValueError, match="no chat template"):
        measure_multiple_choice(model, word_tokenizer, [good], use_chat_template=True)
    with pytest.raises(ValueError, match="delimiter has no entry for 'en'; it has sw"):
        measure_multiple_choice(model, word_tokenizer, [good], delimiter={"sw": " "})
    with pytest.raises(
        ValueError, match="has 203 tokens with its longest choice; the model's context holds 128"
    ):
        measure_multiple_choice(
            model, word_tokenizer, [Question(0, "en", "Ada " * 200, "old", ("old", "in Rome"))]
        )
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="logits are not finite"):
        measure_multiple_choice(model, word_tokenizer, [good])
    assert measure_multiple_choice(model, word_tokenizer, []) == []
