"""Numbers in answers: cases by hand, formats written and read back, and real data."""

import json
import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from shifcon_fast.evaluation.grading import as_number, extract_answer
from shifcon_fast.evaluation.numeric import find_numbers, format_number

CASES = [
    # text, language, wanted
    ("42", None, "42"),
    ("The answer is 42.", "en", "42"),
    ("So 5 + 6 = 11 balls. #### 11", "en", "11"),
    ("#### 42\nThat took 3 steps.", "en", "42"),
    ("#### $1,234.50", "en", "1234.5"),
    ("First #### 1, then #### 2", "en", "2"),
    ("2 and 3 make 5 ####", "en", "5"),
    ("The answer is 42... maybe", "en", "42"),
    ("-7", "en", "-7"),
    ("\u22127", "en", "-7"),
    ("\u20137", "en", "-7"),
    ("－７", "ja", "-7"),
    ("It is -$5.", "en", "-5"),
    ("It is $-5.", "en", "-5"),
    ("(-3)", "en", "-3"),
    ("4 - 9 = -5", "en", "-5"),
    ("4 - 9 = - 5", "en", "-5"),
    ("答案是-5。", "zh", "-5"),
    ("คำตอบคือ-5", "th", "-5"),
    ("+8", "en", "8"),
    ("3-4", "en", "4"),
    ("3–4", "en", "4"),
    ("74 -35", "en", "35"),
    ("(10) -4", "en", "4"),
    ("- 4 apples", "en", "4"),
    ("Ответ — 11.", "ru", "11"),
    ("Boeing-747 had 3", "en", "3"),
    ("12 on 2020-05-01", "en", "12"),
    ("12 am 01.05.2020", "de", "12"),
    ("12 on 5/1/2020", "en", "12"),
    ("7 people at 12:30", "en", "7"),
    ("7 in version 1.2.3", "en", "7"),
    ("3 in x5", "en", "3"),
    ("3 g CO2", "en", "3"),
    ("3 in a_1", "en", "3"),
    ("10^2", "en", "10"),
    ("x² has 2", "en", "2"),
    ("5²", "en", "5"),
    ("2.5", "en", "2.5"),
    (".5", "en", "0.5"),
    ("-.5", "en", "-0.5"),
    ("2,5", "de", "2.5"),
    ("12,50", "en", "12.5"),
    ("0,125", "en", "0.125"),
    ("1234.567", "de", "1234.567"),
    ("1,234", "en", "1234"),
    ("1,234", "de", "1.234"),
    ("1,234", "fr", "1.234"),
    ("1,234", None, "1234"),
    ("1.234", "en", "1.234"),
    ("1.234", "de", "1234"),
    ("1.234", "id", "1234"),
    ("1.234", "tr", "1234"),
    ("1.234", "es", "1234"),
    ("1,234", "es", "1234"),
    ("1,234.56", "de", "1234.56"),
    ("1.234,56", "en", "1234.56"),
    ("1.234.567,8", "en", "1234567.8"),
    ("1,234,567", "de", "1234567"),
    ("1.234.567", "en", "1234567"),
    ("1,23,456", "hi", "123456"),
    ("12,34,567.5", "en", "1234567.5"),
    ("12 345", "fr", "12345"),
    ("12 345,6", "ru", "12345.6"),
    ("12 345", "en", "345"),
    ("12\u00a0345", "en", "12345"),
    ("12\u202f345\u202f678", "fr", "12345678"),
    ("1'234'567.5", "de", "1234567.5"),
    ("1’234", "de", "1234"),
    ("1,2,3", "en", "3"),
    ("5'10", "en", "10"),
    ("１，２３４．５", "ja", "1234.5"),
    ("উত্তর হল ১,২৩,৪৫৬।", "bn", "123456"),
    ("উত্তর ২.৫", "bn", "2.5"),
    ("उत्तर १२,३४,५६७ है", "hi", "1234567"),
    ("คำตอบคือ ๑,๒๓๔", "th", "1234"),
    ("సమాధానం ౧౨.", "te", "12"),
    ("الجواب ١٬٢٣٤٫٥", "ar", "1234.5"),
    ("الجواب ١،٢٣٤", "ar", "1234"),
    ("والنتيجة ۱۲۳", "fa", "123"),
    ("الجواب \u200f-\u200e٥", "ar", "-5"),
    ("50%", "en", "50"),
    ("٥٠٪", "ar", "50"),
    ("€12,50", "de", "12.5"),
    ("Rp5.000", "id", "5000"),
    ("US$5", "en", "5"),
    ("KSh500", "sw", "500"),
    ("1/2", "en", "0.5"),
    ("-3/4", "en", "-0.75"),
    ("1/3", "en", "1/3"),
    ("48/2=24", "en", "24"),
    ("2 1/2", "en", "2.5"),
    ("7/0", "en", "0"),
    ("½", "en", "0.5"),
    ("2½", "en", "2.5"),
    ("1.5e3", "en", "1500"),
    ("3E-2", "en", "0.03"),
    ("答案是3万。", "zh", "30000"),
    ("2万5000円", "ja", "25000"),
    ("3.5亿", "zh", "350000000"),
    ("5kg", "en", "5"),
    ("答えは39個です。", "ja", "39"),
    ("答案:5", "zh", "5"),
    ("no number", "en", None),
    ("", None, None),
    ("####", "en", None),
]


@pytest.mark.parametrize(("text", "language", "wanted"), CASES)
def test_the_final_answer_is_read(text: str, language: str | None, wanted: str | None) -> None:
    found = extract_answer(text, language)
    assert found == (None if wanted is None else Fraction(wanted))


def test_all_numbers_come_in_order() -> None:
    found = find_numbers("He had 1,200 + 3/4 and -5, not x5 or 12:30, so 7.", "en")
    assert found == [1200, Fraction(3, 4), -5, 7]


DIGITS = {
    "ascii": "0123456789",
    "wide": "０１２３４５６７８９",
    "bn": "০১২৩৪৫৬৭৮৯",
    "hi": "०१२३४५६७८९",
    "th": "๐๑๒๓๔๕๖๗๘๙",
    "te": "౦౧౨౩౪౫౬౭౮౯",
    "ar": "٠١٢٣٤٥٦٧٨٩",
    "fa": "۰۱۲۳۴۵۶۷۸۹",
}
CONVENTIONS = [
    # language, group separator, decimal separator, digits, Indian groups
    *[
        (language, ",", ".", "ascii", False)
        for language in ("en", "zh", "ja", "th", "sw", "bn", "te", "ar", "hi")
    ],
    *[(language, ".", ",", "ascii", False) for language in ("de", "vi", "tr", "id", "es")],
    *[
        (language, space, ",", "ascii", False)
        for language in ("fr", "ru")
        for space in (" ", "\u00a0", "\u202f")
    ],
    ("de", "'", ".", "ascii", False),
    ("ja", "，", "．", "wide", False),
    ("bn", ",", ".", "bn", True),
    ("hi", ",", ".", "hi", True),
    ("te", ",", ".", "te", True),
    ("th", ",", ".", "th", False),
    ("ar", "٬", "٫", "ar", False),
    ("fa", "٬", "٫", "fa", False),
]


def written(whole: int, decimals: str, *, group: str, point: str, digits: str, indian: bool) -> str:
    number = str(whole)
    head, tail = (number[:-3], number[-3:]) if len(number) > 3 else ("", number)
    size = 2 if indian else 3
    groups = [head[max(0, end - size) : end] for end in range(len(head), 0, -size)][::-1]
    text = group.join([*groups, tail]) + (point + decimals if decimals else "")
    return text.translate({ord(str(value)): digit for value, digit in enumerate(DIGITS[digits])})


@pytest.mark.parametrize(("language", "group", "point", "digits", "indian"), CONVENTIONS)
def test_what_a_convention_writes_is_read_back(
    language: str, group: str, point: str, digits: str, indian: bool
) -> None:
    generator = random.Random(f"{language}{group}{digits}")
    for _ in range(200):
        whole = generator.randrange(10 ** generator.randint(1, 10))
        decimals = "".join(generator.choices("0123456789", k=generator.choice([0, 1, 2])))
        sign = generator.choice(["", "-", "−"])
        text = sign + written(whole, decimals, group=group, point=point, digits=digits, indian=indian)
        value = Fraction(f"{whole}.{decimals or 0}") * (-1 if sign else 1)
        for sentence in (text, f"= {text}.", f"({text})", f"{text} $", f"\u20ac{text}"):
            assert extract_answer(sentence, language) == value, (sentence, language)


def test_exact_values_of_gold_answers() -> None:
    assert as_number(18) == 18
    assert as_number(0.1) == Fraction(1, 10)
    assert as_number(Decimal("2.50")) == Fraction(5, 2)
    assert as_number(" -1,234.5 ") == Fraction("-1234.5")
    assert as_number("3/4") == Fraction(3, 4)
    assert [as_number(x) for x in ("berlin", "3 apples", "1/0", "", None, True, "1,2")] == [None] * 7


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("42", "42"),
        ("-5/2", "-2.5"),
        ("1/3", "1/3"),
        ("1/80", "0.0125"),
        ("-1/20", "-0.05"),
        ("0", "0"),
        ("7/5", "1.4"),
    ],
)
def test_numbers_are_written_plainly(value: str, text: str) -> None:
    assert format_number(Fraction(value)) == text


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_worked_answer_of_mgsm_is_read(shifcon_data: Path) -> None:
    read = {
        (record["row"], language): (extract_answer(text["response"], language), record["answer"])
        for record in records(shifcon_data / "mgsm_exemplars.jsonl")
        for language, text in record.items()
        if isinstance(text, dict)
    }
    assert len(read) == 8 * 11
    assert {key: pair for key, pair in read.items() if pair[0] != pair[1]} == {}


def test_every_solution_of_gsm8k_is_read(shifcon_data: Path) -> None:
    wrong = [
        r["row"]
        for r in records(shifcon_data / "gsm8k_train_multi.jsonl")
        if extract_answer(r["response_en"], "en") != r["answer"]
    ]
    assert wrong == []


@pytest.mark.parametrize("language", ["de", "es", "fr", "ru", "zh", "ja", "th", "sw", "bn", "te"])
def test_translations_hold_the_numbers_of_their_english_side(language: str, shifcon_data: Path) -> None:
    """Human translations of the same problem: numbers differ only where one side spells them out."""
    pairs = [
        (set(find_numbers(r["en"], "en")), set(find_numbers(r[language], language)))
        for r in records(shifcon_data / "mgsm.jsonl")
    ]
    shared = sum(len(english & other) for english, other in pairs)
    assert shared / sum(len(english) for english, _ in pairs) >= 0.98
