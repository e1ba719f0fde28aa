"""How the CLDR questions are worded in each language.

Names of territories come uninflected and without article from CLDR, so no sentence may ask for a case, an article
or a suffix on them: they stand alone behind a colon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """A language's words.

    Attributes:
        country: the label of a country's name.
        labels, questions: kind of question → its label, and a whole question with ``{country}`` in it.
        colon: between a label and what follows; the space after it included.
    """

    country: str
    labels: Mapping[str, str]
    questions: Mapping[str, str]
    colon: str = ": "


def _wording(
    country: str,
    language: tuple[str, str],
    currency: tuple[str, str],
    continent: tuple[str, str],
    colon: str = ": ",
) -> Wording:
    kinds = {"language": language, "currency": currency, "continent": continent}
    return Wording(
        country,
        {kind: label for kind, (label, _) in kinds.items()},
        {kind: question for kind, (_, question) in kinds.items()},
        colon,
    )


WORDINGS: Mapping[str, Wording] = {
    "en": _wording(
        "Country",
        ("Official language", "What is the official language of this country: {country}?"),
        ("Currency", "What is the currency of this country: {country}?"),
        ("Continent", "On which continent is this country: {country}?"),
    ),
    "de": _wording(
        "Land",
        ("Amtssprache", "Was ist die Amtssprache dieses Landes: {country}?"),
        ("Währung", "Was ist die Währung dieses Landes: {country}?"),
        ("Kontinent", "Auf welchem Kontinent liegt dieses Land: {country}?"),
    ),
    "fr": _wording(
        "Pays",
        ("Langue officielle", "Quelle est la langue officielle de ce pays : {country} ?"),
        ("Monnaie", "Quelle est la monnaie de ce pays : {country} ?"),
        ("Continent", "Sur quel continent se trouve ce pays : {country} ?"),
        " : ",
    ),
    "es": _wording(
        "País",
        ("Idioma oficial", "¿Cuál es el idioma oficial de este país: {country}?"),
        ("Moneda", "¿Cuál es la moneda de este país: {country}?"),
        ("Continente", "¿En qué continente está este país: {country}?"),
    ),
    "sw": _wording(
        "Nchi",
        ("Lugha rasmi", "Lugha rasmi ya nchi hii ni ipi: {country}?"),
        ("Sarafu", "Sarafu ya nchi hii ni ipi: {country}?"),
        ("Bara", "Nchi hii iko katika bara gani: {country}?"),
    ),
    "tr": _wording(
        "Ülke",
        ("Resmî dil", "Bu ülkenin resmî dili nedir: {country}?"),
        ("Para birimi", "Bu ülkenin para birimi nedir: {country}?"),
        ("Kıta", "Bu ülke hangi kıtada: {country}?"),
    ),
    "hi": _wording(
        "देश",
        ("आधिकारिक भाषा", "इस देश की आधिकारिक भाषा क्या है: {country}?"),
        ("मुद्रा", "इस देश की मुद्रा क्या है: {country}?"),
        ("महाद्वीप", "यह देश किस महाद्वीप में है: {country}?"),
    ),
    "id": _wording(
        "Negara",
        ("Bahasa resmi", "Apa bahasa resmi negara ini: {country}?"),
        ("Mata uang", "Apa mata uang negara ini: {country}?"),
        ("Benua", "Di benua mana negara ini terletak: {country}?"),
    ),
    "ru": _wording(
        "Страна",
        ("Официальный язык", "Какой официальный язык в этой стране: {country}?"),
        ("Валюта", "Какая валюта в этой стране: {country}?"),
        ("Часть света", "В какой части света находится эта страна: {country}?"),
    ),
    "zh": _wording(
        "国家",
        ("官方语言", "这个国家的官方语言是什么：{country}？"),
        ("货币", "这个国家的货币是什么：{country}？"),
        ("大洲", "这个国家位于哪个大洲：{country}？"),
        "：",
    ),
    "ja": _wording(
        "国",
        ("公用語", "この国の公用語は何ですか：{country}"),
        ("通貨", "この国の通貨は何ですか：{country}"),
        ("大陸", "この国はどの大陸にありますか：{country}"),
        "：",
    ),
    "th": _wording(
        "ประเทศ",
        ("ภาษาราชการ", "ภาษาราชการของประเทศนี้คืออะไร: {country}"),
        ("สกุลเงิน", "สกุลเงินของประเทศนี้คืออะไร: {country}"),
        ("ทวีป", "ประเทศนี้อยู่ในทวีปใด: {country}"),
    ),
    "bn": _wording(
        "দেশ",
        ("সরকারি ভাষা", "এই দেশের সরকারি ভাষা কী: {country}?"),
        ("মুদ্রা", "এই দেশের মুদ্রা কী: {country}?"),
        ("মহাদেশ", "এই দেশটি কোন মহাদেশে: {country}?"),
    ),
    "te": _wording(
        "దేశం",
        ("అధికార భాష", "ఈ దేశ అధికార భాష ఏమిటి: {country}?"),
        ("కరెన్సీ", "ఈ దేశ కరెన్సీ ఏమిటి: {country}?"),
        ("ఖండం", "ఈ దేశం ఏ ఖండంలో ఉంది: {country}?"),
    ),
    "ar": _wording(
        "البلد",
        ("اللغة الرسمية", "ما اللغة الرسمية لهذا البلد: {country}؟"),
        ("العملة", "ما عملة هذا البلد: {country}؟"),
        ("القارة", "في أي قارة يقع هذا البلد: {country}؟"),
    ),
    "vi": _wording(
        "Quốc gia",
        ("Ngôn ngữ chính thức", "Ngôn ngữ chính thức của quốc gia này là gì: {country}?"),
        ("Tiền tệ", "Đơn vị tiền tệ của quốc gia này là gì: {country}?"),
        ("Châu lục", "Quốc gia này nằm ở châu lục nào: {country}?"),
    ),
}
"""Language → its words."""
