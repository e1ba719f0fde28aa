"""Greedy answers against a plain loop of argmax, and exact match against cases by hand."""

import copy

import pytest
import torch

from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.answers import is_correct, normalise_text
from shifcon_fast.evaluation.questions import _StopStrings, answer_questions, default_stop_strings

QUESTIONS = [
    Question(0, "en", "Ada lives in ?", "Rome"),
    Question(0, "sw", "paka wa Ada ni mzee na mkate na samaki ?", 3),
    Question(1, "de", "Ben ?", 12),
    Question(1, "tr", "kedisi yaşlı Cem kırmızı", "kedi"),
    Question(2, "en", "the cat of Eva", "is old"),
]


def naive_answer(model, tokenizer, text: str, steps: int, **extra: object) -> str:
    """Greedy decoding of one unpadded prompt, without a cache; stops at EOS."""
    ids = tokenizer(text + "\n", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(steps):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False, **extra).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [2, 5])
def test_greedy_answers_of_a_mixed_batch(tiny_model, word_tokenizer, batch_size) -> None:
    model = tiny_model()
    found = answer_questions(model, word_tokenizer, QUESTIONS, batch_size=batch_size, max_new_tokens=8)
    assert [(o.row, o.language) for o in found] == [(q.row, q.language) for q in QUESTIONS]
    assert [o.response for o in found] == [naive_answer(model, word_tokenizer, q.text, 8) for q in QUESTIONS]
    assert len({o.response for o in found}) > 1


def test_each_row_is_shifted_by_its_own_language(attached, word_tokenizer) -> None:
    found = answer_questions(
        attached.model, word_tokenizer, QUESTIONS, handle=attached, batch_size=5, max_new_tokens=8
    )
    wanted = [
        naive_answer(
            attached.model, word_tokenizer, q.text, 8, language_ids=attached.language_ids(q.language)
        )
        for q in QUESTIONS
    ]
    assert [o.response for o in found] == wanted
    plain = answer_questions(attached.model, word_tokenizer, QUESTIONS, max_new_tokens=8)
    assert [o.response for o in plain if o.language == "en"] == [wanted[0], wanted[4]]
    assert [o.response for o in plain] != wanted


def test_generation_ends_at_eos_and_at_stop_strings(tiny_model, word_tokenizer) -> None:
    model = tiny_model()
    whole = answer_questions(model, word_tokenizer, QUESTIONS[:1], max_new_tokens=8)[0].response.split()
    stopped = answer_questions(
        model, word_tokenizer, QUESTIONS[:1], max_new_tokens=8, stop_strings=[whole[2]]
    )[0].response
    assert stopped == " ".join(whole[: whole.index(whole[2])])
    with torch.no_grad():  # now </s> always wins: every answer is empty
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 10 * model.model.norm.weight.sign()
    model.model.norm.register_forward_hook(lambda module, args, output: output.abs() * module.weight.sign())
    assert answer_questions(model, word_tokenizer, QUESTIONS[:1], max_new_tokens=8)[0].response == ""


def test_prompts_hold_the_template_and_the_worked_examples(tiny_model, word_tokenizer) -> None:
    found = answer_questions(
        tiny_model(),
        word_tokenizer,
        QUESTIONS[:1],
        max_new_tokens=1,
        prompt_template={"en": "the {question}"},
        few_shot={"en": [("cat ?", "red")]},
    )
    assert found[0].prompt == "<s> the cat ? red the Ada lives in ?"


def test_the_chat_template_is_used_where_there_is_one(tiny_model, word_tokenizer) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'cat ' if m.role == 'user' else 'fish ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}bread{% endif %}"
    )
    found = answer_questions(tiny_model(), tokenizer, QUESTIONS[:1], max_new_tokens=1)
    assert found[0].prompt.removeprefix("<s> ") == "cat Ada lives in ? bread"


@pytest.mark.parametrize(
    ("response", "answer", "language", "correct", "parsed"),
    [
        ("5 + 6 = 11. The answer is 11.", 11, "en", True, "11"),
        ("Die Antwort lautet 1.234.", 1234, "de", True, "1234"),
        ("The answer is 1.234.", 1234, "en", False, "1.234"),
        ("উত্তর হল ১২৩।", "123", "bn", True, "123"),
        ("18.0", 18, "en", True, "18"),
        ("3.33", 3.3, "en", False, "3.33"),
        ("0.1", 0.1, "en", True, "0.1"),
        ("I do not know", 3, "en", False, None),
        (" Nairobi. ", "nairobi", "sw", True, "nairobi"),
        ("ＮＡＩＲＯＢＩ", "Nairobi", "sw", True, "nairobi"),
        ("Mji wa\n Nairobi", "mji wa nairobi", "sw", True, "mji wa nairobi"),
        ("Nairobi Kenya", "Nairobi", "sw", False, "nairobi kenya"),
        ("Straße", "STRASSE", "de", True, "strasse"),
        ("", "Nairobi", "sw", False, ""),
    ],
)
def test_exact_match(response: str, answer: object, language: str, correct: bool, parsed: str | None) -> None:
    assert is_correct(response, answer, language) == (correct, parsed)


def test_punctuation_inside_stays() -> None:
    assert normalise_text("«don't  stop»!") == "don't stop"


def test_what_an_example_holds_of_the_template_is_not_said_twice(tiny_model, word_tokenizer) -> None:
    found = answer_questions(
        tiny_model(),
        word_tokenizer,
        QUESTIONS[:1],
        max_new_tokens=1,
        prompt_template="the : {question}\nis :",
        few_shot={"en": [("the : cat ?", "is : red"), ("cat ?", "old")]},
    )
    assert found[0].prompt == "<s> the : cat ? is : red the : cat ? is : old the : Ada lives in ? is :"


def test_default_stop_strings(word_tokenizer) -> None:
    found = default_stop_strings(word_tokenizer, ["sw", "fr"])
    assert {"\nQuestion:", "\nQ:", "\nSwali:", "\nQuestion :", "\nUser:", "<|im_end|>", "</s>"} <= set(found)
    assert not any("Frage" in stop or "{" in stop for stop in found)
    assert "\nFrage:" in default_stop_strings(word_tokenizer, ["de"])
    assert "\nPuzzle" in default_stop_strings(word_tokenizer, [], "Solve.\nPuzzle {question}\nSolution:")
    by_language = {"en": "Riddle {question}", "sw": "Kitendawili {question}"}
    assert {"\nRiddle", "\nKitendawili"} <= set(default_stop_strings(word_tokenizer, [], by_language))
    one_line = default_stop_strings(word_tokenizer, ["en"], few_shot={"en": [("a", "b")]})
    assert "\n" in one_line
    assert "\n" not in default_stop_strings(word_tokenizer, ["en"], few_shot={"en": [("a", "b\nc")]})
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert default_stop_strings(tokenizer, ["en"]) == ()


def test_a_stop_string_counts_only_once_it_is_complete(word_tokenizer) -> None:
    """Looked for in the last tokens, of which a byte fills at least one."""
    criterion = _StopStrings(word_tokenizer, ["red cat"], start=1)
    ids = word_tokenizer(["red cat", "cat red", "the red cat is"], add_special_tokens=False)["input_ids"]
    for words, wanted in zip(ids, [True, False, True], strict=True):
        padded = torch.tensor([[1, *words]])
        assert criterion(padded, torch.empty(0)).tolist() == [wanted]
    start_only = _StopStrings(word_tokenizer, ["red cat"], start=3)
    assert start_only(torch.tensor([[1, *ids[0]]]), torch.empty(0)).tolist() == [False]  # it is in the prompt


def test_bad_input_is_named(tiny_model, word_tokenizer) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="row 0 in 'en' twice"):
        answer_questions(model, word_tokenizer, [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(ValueError, match=r"wanted a text with \{question\} in it"):
        answer_questions(model, word_tokenizer, QUESTIONS[:1], prompt_template="Q:")
    with pytest.raises(ValueError, match="prompt_template has no entry for 'en'; it has de"):
        answer_questions(model, word_tokenizer, QUESTIONS[:1], prompt_template={"de": "{question}"})
    with pytest.raises(ValueError, match="few_shot has no example in 'en'; it has de"):
        answer_questions(model, word_tokenizer, QUESTIONS[:1], few_shot={"de": [("a", "b")]})
    with pytest.raises(ValueError, match=r"stop_strings is .*; wanted no empty text"):
        answer_questions(model, word_tokenizer, QUESTIONS[:1], stop_strings=[""])
    with pytest.raises(ValueError, match=r"question 3 \(en\): answer is nan; wanted a finite number"):
        answer_questions(model, word_tokenizer, [Question(3, "en", "Rome ?", float("nan"))])
    long = Question(7, "en", "Rome " * 130, "Rome")
    with pytest.raises(ValueError, match=r"question 7 \(en\) makes a prompt of 131 tokens"):
        answer_questions(model, word_tokenizer, [long])


@pytest.mark.parametrize("language", ["de", "deu", "deu_Latn", "de-DE", "de_AT"])
def test_number_formats_go_by_the_language_however_it_is_written(language: str) -> None:
    assert is_correct("Es sind 1.234", 1234, language) == (True, "1234")


def test_templates_and_examples_are_found_however_the_language_is_written(tiny_model, word_tokenizer) -> None:
    (found,) = answer_questions(
        tiny_model(),
        word_tokenizer,
        [Question(0, "swh_Latn", "Ada", 1)],
        max_new_tokens=1,
        prompt_template={"sw": "paka {question}", "en": "cat {question}"},
        few_shot={"sw": [("Ben", "mzee")]},
    )
    assert found.prompt.split() == ["<s>", "paka", "Ben", "mzee", "paka", "Ada"]


def test_a_language_that_cannot_be_told_is_said(tiny_model, word_tokenizer, caplog) -> None:
    asked = [Question(0, "luo_Latn", "Ada", 1), Question(0, "sw", "Ada", 1)]
    found = answer_questions(tiny_model(), word_tokenizer, asked, max_new_tokens=1)
    assert found[0].in_language is None
    assert "The language of answers in luo_Latn is not judged" in caplog.text
