"""The language of an answer, on real sentences of 16 languages and on answers that cannot be told."""

import json
from pathlib import Path

import pytest

from shifcon_fast.evaluation.answer_language import AnswerLanguage

LANGUAGES = ("en", "de", "es", "fr", "ru", "zh", "ja", "th", "sw", "bn", "te", "ar", "hi", "vi", "tr", "id")


@pytest.fixture(scope="module")
def identifier() -> AnswerLanguage:
    return AnswerLanguage(LANGUAGES)


@pytest.fixture(scope="module")
def sentences(shifcon_data: Path) -> dict[str, list[str]]:
    text = (shifcon_data / "ntrex128.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()[:150]]
    return {language: [row[language] for row in rows] for language in LANGUAGES}


def score(identifier: AnswerLanguage, texts: list[str], language: str) -> tuple[int, int, int]:
    """Right, wrong, undecided."""
    answers = [identifier.agrees(text, language) for text in texts]
    return answers.count(True), answers.count(False), answers.count(None)


def test_whole_sentences_are_told(identifier: AnswerLanguage, sentences: dict[str, list[str]]) -> None:
    counts = {language: score(identifier, texts, language) for language, texts in sentences.items()}
    right, wrong, undecided = (sum(column) for column in zip(*counts.values(), strict=True))
    assert right / (right + wrong) >= 0.998
    assert undecided / 2400 <= 0.01
    assert all(counts[language][1] == 0 for language in ("ja", "bn", "te", "ru", "ar", "hi")), counts


@pytest.mark.slow("tells the language of 2,400 more texts")
def test_twenty_characters_are_told_or_left_undecided(
    identifier: AnswerLanguage, sentences: dict[str, list[str]]
) -> None:
    counts = [score(identifier, [t[:20] for t in texts], language) for language, texts in sentences.items()]
    right, wrong, undecided = (sum(column) for column in zip(*counts, strict=True))
    assert right / (right + wrong) >= 0.98
    assert 0.02 <= undecided / 2400 <= 0.15


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("42", None),
        ("$1,234.50 = 50%", None),
        ("", None),
        ("x = 7", None),
        ("Berlin", None),
        ("บ้าน", None),  # three letters of Thai
        ("คำตอบคือ 42 บาท", "th"),
        ("答えは39個です。", "ja"),
        ("答案是三十九个苹果。", "zh"),
        ("Ответ: двенадцать", "ru"),
        ("Το σπίτι είναι μεγάλο", "other"),
        ("The farmer then sells the remaining eggs at the market.", "en"),
        ("Der Bauer verkauft dann die übrigen Eier auf dem Markt.", "de"),
        ("Kisha mkulima anauza mayai yaliyobaki sokoni.", "sw"),
        ("Çiftçi daha sonra kalan yumurtaları pazarda satıyor.", "tr"),
    ],
)
def test_single_answers(identifier: AnswerLanguage, text: str, found: str | None) -> None:
    assert identifier.identify(text) == found


def test_only_candidates_are_named() -> None:
    identifier = AnswerLanguage(["en", "th", "zh"])
    assert identifier.identify("ひらがなとカタカナで書く") == "other"
    assert identifier.identify("คำตอบคือสี่สิบสอง") == "th"
    assert identifier.agrees("คำตอบคือสี่สิบสอง", "en") is False
    assert identifier.agrees("42", "en") is None


def test_unknown_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="names 'xx', which py3langid cannot tell"):
        AnswerLanguage(["en", "xx"])
    with pytest.raises(ValueError, match="language is 'de'; wanted one of the candidates en, sw"):
        AnswerLanguage(["en", "sw"]).agrees("Guten Morgen", "de")


def test_codes_of_every_form_are_told() -> None:
    identifier = AnswerLanguage(["eng_Latn", "swh_Latn", "deu", "zho_Hant", "pt-BR"])
    assert identifier.identify("Kisha mkulima anauza mayai yaliyobaki sokoni.") == "swh_Latn"
    assert identifier.identify("答案是三十九個蘋果。") == "zho_Hant"
    assert identifier.agrees("Der Bauer verkauft dann die übrigen Eier auf dem Markt.", "deu") is True
    assert identifier.agrees("O fazendeiro vende os ovos restantes na feira da cidade.", "pt-BR") is True
    assert identifier.agrees("答案是三十九個蘋果。", "eng_Latn") is False
    with pytest.raises(ValueError, match="names 'luo_Latn', which py3langid cannot tell"):
        AnswerLanguage(["en", "luo_Latn"])


def test_the_script_of_a_code_counts() -> None:
    cyrillic, latin = "Фармер продаје преостала јаја на пијаци.", "Farmer prodaje preostala jaja na pijaci."
    either = AnswerLanguage(["en", "sr"])
    assert (either.agrees(cyrillic, "sr"), either.agrees(latin, "sr")) == (True, True)
    one = AnswerLanguage(["en", "sr-Latn"])
    assert (one.agrees(cyrillic, "sr-Latn"), one.agrees(latin, "sr-Latn")) == (False, True)
    both = AnswerLanguage(["sr-Latn", "sr-Cyrl"])
    assert (both.agrees(cyrillic, "sr-Latn"), both.agrees(cyrillic, "sr-Cyrl")) == (False, True)
    oriya = AnswerLanguage(["en", "ory_Orya"])
    assert oriya.identify("ଓଡ଼ିଆ ଏକ ଭାଷା ଅଟେ") == "ory_Orya"
