"""Where the answer of a response stands, what a gold answer accepts, what is right: by hand, and on real data."""

import json
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from babel.numbers import format_decimal

from shifcon_fast.evaluation.answer_words import ANSWER_WORDS
from shifcon_fast.evaluation.grading import (
    as_number,
    before_next_question,
    extract_answer,
    is_correct,
    normalise_text,
    read_gold,
)
from shifcon_fast.evaluation.numeric import visible

INVISIBLE = {
    **{f"U+{code:04X}": chr(code) for code in (*range(0x200B, 0x2010), 0x061C, *range(0x2060, 0x2065))},
    **{f"U+{code:04X}": chr(code) for code in (*range(0x2066, 0x206A), 0xFEFF, 0x00AD, 0xFE0E, 0xFE0F)},
    **{
        f"U+{code:04X}": chr(code)
        for code in (0x202A, 0x202B, 0x202C, 0x202D, 0x202E, 0x034F, 0x180E, 0xE0100)
    },
}

RESPONSES = [
    # response, language, wanted
    # --- boxes
    (r"Janet makes \boxed{18} dollars over 3 days.", "en", "18"),
    (r"\boxed{1,\!234}", "en", "1234"),
    (r"\boxed{1{,}234}", "en", "1234"),
    (r"\boxed{1\,234}", "en", "1234"),
    (r"\boxed{\frac{3}{4}}", "en", "3/4"),
    (r"\boxed{-\dfrac{2}{3}}", "en", "-2/3"),
    (r"\boxed{2\frac{1}{2}}", "en", "5/2"),
    (r"\boxed{\frac12} of 3", "en", "1/2"),
    (r"\boxed{\mathbf{\frac{10}{4}}}", "en", "5/2"),
    (r"$\boxed{\text{18}}$ in 3", "en", "18"),
    (r"\boxed{18\text{ cm}} in 3", "en", "18"),
    (r"\boxed{\$18} in 3", "en", "18"),
    (r"\boxed{50\%} of 3", "en", "50"),
    (r"\boxed{75^\circ} and 3", "en", "75"),
    (r"\boxed{x = 5 + 6 = 11} 3", "en", "11"),
    (r"\boxed{1.5 \times 10^{3}} 3", "en", "1500"),
    (r"\boxed{\boxed{7}} 9", "en", "7"),
    (r"\boxed 18 and 3", "en", "18"),
    (r"\fbox{18} and 3", "en", "18"),
    (r"\\boxed{18}, over 3 days", "en", "18"),
    (r"\boxed{.5} of 3", "en", "0.5"),
    (r"\boxed{18\ \mathrm{km/h}} in 3", "en", "18"),
    (r"\boxed{\text{Total: }18} in 3", "en", "18"),
    (r"\boxed{5}, no: \boxed{18}. 3 days", "en", "18"),
    (r"\boxed{18", "en", "18"),
    (r"Put it into \boxed{}: 18", "en", "18"),
    (r"\boxed{١٨} في ٣", "ar", "18"),
    (r"\boxed{1.234,5} in 3", "de", "1234.5"),
    (r"It is 3. \boxed{3\sqrt{2}}", "en", None),
    (r"\boxed{2\pi}", "en", None),
    (r"\(18 \div 3 = 6\)", "en", "6"),
    # --- ####
    ("16 - 7 = 9\n#### 18", "en", "18"),
    ("#### $1,234.50 a day for 3 days", "en", "1234.5"),
    ("#### 18 … Question: … #### 21", "en", "18"),
    ("#### 18\n\nQ: How many? 21\n#### 21", "en", "18"),
    ("#### 5 + 6 = 11\n3 steps", "en", "11"),
    ("#### Step 1: Eggs\n16-3=13\n#### Step 2: Money\nIt is 18.", "en", "18"),
    ("#### 1. Eggs\n13\n#### 2. Money\nIt is 18.", "en", "18"),
    ("### Answer\n18", "en", "18"),
    # --- words
    ("The answer is 18. That took 3 steps.", "en", "18"),
    ("So the final answer is: **18**.\n\n3 steps", "en", "18"),
    ("The answer is $18$ since 3", "en", "18"),
    (r"The final answer is \(18\). 3 days", "en", "18"),
    ("The answer is USD 18. 3 days", "en", "18"),
    ("The answer is 5 + 6 = 11.", "en", "11"),
    ("The answer is 9 + 20 = 29 computers. 3", "en", "29"),
    ("The answer is 5. No: the answer is 18. 3 steps", "en", "18"),
    ("The answer is not 5 but 7.", "en", "7"),
    ("Answer: 18\nBecause 3 days", "en", "18"),
    ("**Answer:** 18 dollars\n3 days", "en", "18"),
    ("Answer: 16 - 3 - 4 = 9 eggs.\n9 * 2 = 18", "en", "18"),
    ("Answer: 16 eggs are laid, of which she eats 3.\nSo 18", "en", "18"),
    ("I answer 3 questions, then 18.", "en", "18"),
    ("Die Antwort lautet 18. In 3 Tagen.", "de", "18"),
    ("La respuesta es 18. En 3 días.", "es", "18"),
    ("La réponse est de 18. En 3 jours.", "fr", "18"),
    ("Réponse : 18\n3 jours", "fr", "18"),
    ("Ответ — 18. За 3 дня.", "ru", "18"),
    ("Ответ: 18.\n3 дня", "ru", "18"),
    ("Ответ—18, за 3 дня", "ru", "18"),
    ("Ответ: −18", "ru", "-18"),
    ("故答案为：18。共3天", "zh", "18"),
    ("答案是 18。用了3天。", "zh", "18"),
    ("答案是三。用了2天。", "zh", "3"),
    ("答案是一样的，5", "zh", "5"),
    ("答えは三個です。2日", "ja", "3"),
    ("答え：18\n3日", "ja", "18"),
    ("คำตอบคือ 18 ใน 3 วัน", "th", "18"),
    ("Jibu ni 18. Siku 3.", "sw", "18"),
    ("উত্তর হল ১৮। ৩ দিন", "bn", "18"),
    ("సమాధానం 9.బొమ్మలున్నాయి.", "te", "9"),
    ("الإجابة هي ١٨. خلال ٣ أيام", "ar", "18"),
    ("उत्तर 18 है। 3 दिन", "hi", "18"),
    ("Đáp án là 18. Trong 3 ngày.", "vi", "18"),
    ("Cevap 18'dir. 3 gün", "tr", "18"),
    ("Jawabannya adalah 18. Dalam 3 hari.", "id", "18"),
    # --- a new question, a new turn
    ("The answer is 18.\n\nQuestion: 5 cats. The answer is 21.", "en", "18"),
    ("18\nUser: and 21?", "en", "18"),
    ("18<|im_end|>\n<|im_start|>user\n21", "en", "18"),
    ("18\n### Instruction:\n21", "en", "18"),
    ("Question: 5 cats? Answer: 18.", "en", "18"),
    ("Question: 5 cats?\nThe answer is 18.\nQuestion 2: 21", "en", "18"),
    ("Die Antwort ist 18.\nFrage: Wie alt ist 21?", "de", "18"),
    ("答えは18です。問題：ロジャーは21個", "ja", "18"),
    ("คำตอบคือ 18\nโจทย์: 21", "th", "18"),
    # --- numerals of Chinese and Japanese
    ("2万5千円", "ja", "25000"),
    ("1億8990万", "ja", "189900000"),
    ("1 亿 2000 万", "zh", "120000000"),
    ("3.5万", "zh", "35000"),
    ("3 万美元", "zh", "30000"),
    ("3百万円", "ja", "3000000"),
    ("3万亿", "zh", "3000000000000"),
    ("2亿3千万", "zh", "230000000"),
    ("三百二十", "ja", "320"),
    ("十五", "zh", "15"),
    ("5人で十万円", "ja", "100000"),
    ("5个百万富翁", "zh", "5"),
    ("一百二十三万四千五百六十七", "zh", "1234567"),
    ("1兆2000億円", "ja", "1200000000000"),
    ("3分間で2万5,000円", "ja", "25000"),
    ("一百零五", "zh", "105"),
    ("一千二百三十四", "zh", "1234"),
    ("壹佰贰拾", "zh", "120"),
    ("两千", "zh", "2000"),
    ("两万五", "zh", "25000"),
    ("二万五", "ja", "20005"),
    ("两万零五", "zh", "20005"),
    ("三分之一", "zh", "1/3"),
    ("3分の1", "ja", "1/3"),
    ("百分之二十", "zh", "20"),
    ("3千克", "zh", "3"),
    ("5兆瓦", "zh", "5"),
    ("10分の休憩", "ja", "10"),
    ("5个。一起去，千万不要", "zh", "5"),
    ("１２３", "ja", "123"),
    # --- other scripts and shapes
    ("1,23,456", "hi", "123456"),
    ("١٬٢٣٤٫٥", "ar", "1234.5"),
    ("1️⃣8️⃣", "en", "18"),
    ("𝟏𝟖", "en", "18"),
    ("_18_", "en", "18"),
    ("*18*", "en", "18"),
    ("2 ½ cups", "en", "5/2"),
    ("1.5 × 10^3", "en", "1500"),
    ("2 x 10³", "en", "2000"),
    # --- far too much
    ("So 18. " + "1" * 5000, "en", None),
    ("1e999999999", "en", None),
    ("1" + ",234" * 2000, "en", None),
    ("1/" + "3" * 5000, "en", None),
    ("#### " + "9" * 5000, "en", None),
]


@pytest.mark.parametrize(("response", "language", "wanted"), RESPONSES, ids=lambda x: str(x)[:40])
def test_the_answer_of_a_response(response: str, language: str, wanted: str | None) -> None:
    assert extract_answer(response, language) == (None if wanted is None else Fraction(wanted))


GOLDS = [
    # gold, language, values
    ("Mark has 36 books.\n#### 36", "en", ["36"]),
    ("He pays <<12*100=1200>>1,200.\n#### 1,200", "en", ["1200"]),
    (r"So $x = 3$, which is \boxed{\frac{3}{4}}.", "en", ["3/4"]),
    ("Step-by-Step Answer: 5 + 6 = 11. The answer is 11.", "en", ["11"]),
    ("18", "en", ["18"]),
    ("১৮", "bn", ["18"]),
    ("१,२३,४५६", "hi", ["123456"]),
    ("1,23,456", "hi", ["123456"]),
    ("$18", "en", ["18"]),
    (r"\$18", "en", ["18"]),
    ("€12,50", "de", ["12.5"]),
    ("KSh 500", "sw", ["500"]),
    ("100 US$", "en", ["100"]),
    ("−5", "en", ["-5"]),
    ("- 5", "en", ["-5"]),
    ("-$5", "en", ["-5"]),
    ("+5", "en", ["5"]),
    ("50%", "en", ["50"]),
    ("٥٠٪", "ar", ["50"]),
    ("1,234", "en", ["1234"]),
    ("1,234", "de", ["1.234", "1234"]),  # its own format, and that of the English original
    ("1.234,5", "de", ["1234.5"]),
    ("2 345", "fr", ["2345"]),
    ("1.234.567", "id", ["1234567"]),
    ("1,2", "de", ["1.2"]),
    ("3/4", "en", ["3/4"]),
    ("3 / 4", "en", ["3/4"]),
    ("½", "en", ["1/2"]),
    ("2 1/2", "en", ["5/2"]),
    (r"\frac{3}{4}", "en", ["3/4"]),
    ("1e3", "en", ["1000"]),
    ("18 cm", "en", ["18"]),
    ("20 m^2", "en", ["20"]),
    ("60 km/h", "en", ["60"]),
    ("18 dollars per day", "en", ["18"]),
    ("5 Stunden", "de", ["5"]),
    ("4 часа", "ru", ["4"]),
    ("18個", "ja", ["18"]),
    ("18美元", "zh", ["18"]),
    ("18 ดอลลาร์", "th", ["18"]),
    ("18 টাকা", "bn", ["18"]),
    ("2万5千円", "ja", ["25000"]),
    ("五", "zh", ["5"]),
    ("18.", "en", ["18"]),
    (18, "en", ["18"]),
    (0.1, "en", ["1/10"]),
    (Decimal("2.50"), "en", ["5/2"]),
    (["18", 18.5], "en", ["18", "18.5"]),
    # --- text
    ("three", "en", []),
    ("Apollo 11", "en", []),
    ("3 apples", "en", []),
    ("12:30", "en", []),
    ("2020-05-01", "en", []),
    ("1, 2", "en", []),
    ("1,2", "en", []),
    ("x5", "en", []),
    ("1" * 5000, "en", []),
    ("1e999999999", "en", []),
]


@pytest.mark.parametrize(("gold", "language", "values"), GOLDS, ids=lambda x: str(x)[:40])
def test_the_values_of_a_gold_answer(gold: object, language: str, values: list[str]) -> None:
    read = read_gold(gold, language)
    assert list(read.numbers) == [Fraction(value) for value in values]
    assert bool(read.texts) is (not values)


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (None, "answer is None; wanted a number or a text"),
        (True, "answer is True; wanted a number or a text"),
        (float("nan"), "answer is nan; wanted a finite number"),
        (float("-inf"), "answer is -inf; wanted a finite number"),
        (Decimal("NaN"), "answer is NaN; wanted a finite number"),
        (Decimal("1e999999999"), "exponent of 999999999; wanted at most 1000"),
        (10**1001, "more than 1000 digits"),
        ("", "which is empty"),
        ("\u200b \ufeff", "which is empty"),
        ([], "an empty list"),
        (["18", None], "answer is None"),
    ],
    ids=lambda x: str(x)[:30] if isinstance(x, str) else type(x).__name__,
)
def test_what_is_no_gold_answer(gold: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_gold(gold, "en")


@pytest.mark.parametrize(
    ("response", "answer", "language", "correct", "parsed"),
    [
        ("The answer is 18.", ["18", "eighteen"], "en", True, "18"),
        ("Eighteen.", ["18", "eighteen"], "en", True, "eighteen"),
        ("nineteen", ["18", "eighteen"], "en", False, "nineteen"),
        ("1.234", "1,234", "de", True, "1234"),
        ("The answer is Nairobi.", "Nairobi", "en", True, "nairobi"),
        ("Jibu ni **Nairobi**. Ni mji.", "Nairobi", "sw", True, "nairobi"),
        ("Antwort: Köln\nDie Stadt am Rhein", "köln", "de", True, "köln"),
        (r"So \boxed{\text{Nairobi}}, of course.", "Nairobi", "sw", True, "nairobi"),
        ("#### St. Louis", "St. Louis", "en", True, "st. louis"),
        ("Nairobi\nSwali: Mji mkuu?", "Nairobi", "sw", True, "nairobi"),
        ("The answer is Paris. No, the answer is Rome.", "Paris", "en", False, "rome"),
        ("The answer is 3 apples.", "3 apples", "en", True, "3 apples"),
        ("don’t", "don't", "en", True, "don't"),
        ("৩টি আপেল", "৩টি আপেল", "bn", True, "3টি আপেল"),
        ("Nairobi", r"\text{Nairobi}", "sw", True, "nairobi"),
        ("İstanbul", "istanbul", "tr", True, "istanbul"),
        ("Me\u0301xico", "México", "es", True, "méxico"),
    ],
)
def test_right_and_wrong(
    response: str, answer: object, language: str, correct: bool, parsed: str | None
) -> None:
    assert is_correct(response, answer, language) == (correct, parsed)


@pytest.mark.parametrize("mark", INVISIBLE.values(), ids=INVISIBLE.keys())
def test_invisible_characters_change_nothing(mark: str) -> None:
    assert visible(f"{mark}1{mark}8{mark}") == "18"
    for text in (f"{mark}18", f"18{mark}", f"1{mark}8", f"{mark}-{mark}18{mark}%"):
        value = -18 if "-" in text else 18
        assert extract_answer(f"#### {text}", "en") == value
        assert extract_answer(f"The{mark} answer{mark} is {text}{mark}. 3 days", "en") == value
        assert as_number(text) == value
    for text in (f"{mark}Nairobi", f"Nairobi{mark}", f"Nai{mark}robi"):
        assert is_correct(text, "Nairobi", "sw")[0]
        assert is_correct("Nairobi", text, "sw")[0]
        assert normalise_text(text) == "nairobi"


@pytest.mark.parametrize("language", sorted(ANSWER_WORDS))
def test_every_language_has_words_that_work(language: str) -> None:
    words = ANSWER_WORDS[language]
    for question in words.questions:
        for colon in (":", " :", "："):
            assert before_next_question(f"7 x\n{question}{colon} 9") == "7 x\n"
            assert before_next_question(f"{question}{colon} 9") == f"{question}{colon} 9"
    for head in words.heads.split("|"):
        if head.isalpha():
            assert extract_answer(f"5\n{head}: 7\n9", language) == 7


@pytest.mark.parametrize("unit", ["-1 ", "三分之", r"\boxed{\frac{", "The answer is ", " "])
def test_time_grows_with_the_length(unit: str) -> None:
    """Four times the text takes about four times as long; 16 times would be quadratic."""
    seconds = []
    for length in (10_000, 40_000):
        text = (unit * length)[:length]
        start = time.process_time()
        extract_answer(text, "zh")
        is_correct(text + "#### 18", "Nairobi", "fr")
        seconds.append(time.process_time() - start)
    assert seconds[1] < 10 * seconds[0] + 0.2


def test_a_great_many_digits_is_no_number() -> None:
    assert extract_answer("1" * 500_000, "en") is None
    assert is_correct("9" * 500_000, 18, "en") == (False, None)


# --- real data --------------------------------------------------------------------------------------------------


ZEROS = {"bn": "০", "hi": "०", "te": "౦", "th": "๐", "ar": "٠", "zh": "０", "ja": "０"}


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["mgsm.jsonl", "msvamp.jsonl", "gsm8k_train_multi.jsonl"])
def test_every_gold_answer_in_every_language_and_spelling(name: str, shifcon_data: Path) -> None:
    """As a number, as text, and as Unicode's locale data groups it, in ASCII and in the language's own digits."""
    rows = records(shifcon_data / name)
    languages = [key for key in rows[0] if len(key) == 2]
    answers = {row["answer"] for row in rows}
    wrong = []
    for language in languages:
        own = {ord(str(digit)): chr(ord(ZEROS.get(language, "0")) + digit) for digit in range(10)}
        for answer in answers:
            grouped = format_decimal(answer, locale=language)
            assert answer in read_gold(answer, language).numbers
            for spelling in {
                text.translate(digits) for text in (str(answer), grouped) for digits in ({}, own)
            }:
                if answer not in read_gold(spelling, language).numbers:
                    wrong.append((spelling, language))
                if extract_answer(f"7, so {spelling}!", language) != answer:
                    wrong.append((f"7, so {spelling}!", language))
    assert len(answers) > 40
    assert wrong == []


def test_every_solution_of_gsm8k_is_a_gold_answer(shifcon_data: Path) -> None:
    rows = records(shifcon_data / "gsm8k_train_multi.jsonl")
    wrong = [row["row"] for row in rows if read_gold(row["response_en"], "en").numbers != (row["answer"],)]
    assert len(rows) == 2000
    assert wrong == []


def test_worked_answers_of_mgsm_are_read_before_the_next_question(shifcon_data: Path) -> None:
    """As a model without an end-of-turn token goes on: the next example follows at once."""
    rows = records(shifcon_data / "mgsm_exemplars.jsonl")
    wrong = []
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        for language, text in row.items():
            if isinstance(text, dict):
                more = f"{following[language]['question']}\n{following[language]['response']}"
                for gap in ("\n\n", "\n", " "):
                    found = extract_answer(text["response"] + gap + more, language)
                    if found != row["answer"]:
                        wrong.append((row["row"], language, gap, found))
    assert wrong == []
