"""Greedy answers against a plain loop of argmax, and exact match against cases by hand."""

import copy

import pytest
import torch

from shifcon_fast.data.questions import Question
from shifcon_fast.evaluation.questions import answer_questions, is_correct, normalise_text

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


def test_bad_input_is_named(tiny_model, word_tokenizer) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="row 0 in 'en' twice"):
        answer_questions(model, word_tokenizer, [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(ValueError, match=r"wanted a text with \{question\} in it"):
        answer_questions(model, word_tokenizer, QUESTIONS[:1], prompt_template="Q:")
    with pytest.raises(ValueError, match="prompt_template has no entry for 'en'; it has de"):
        answer_questions(model, word_tokenizer, QUESTIONS[:1], prompt_template={"de": "{question}"})
    long = Question(7, "en", "Rome " * 130, "Rome")
    with pytest.raises(ValueError, match=r"question 7 \(en\) makes a prompt of 131 tokens"):
        answer_questions(model, word_tokenizer, [long])
