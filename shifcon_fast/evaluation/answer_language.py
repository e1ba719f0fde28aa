"""Is an answer in the language it was asked for?

Two looks at the text: the script of its letters, which rules languages out (kana is Japanese, Telugu letters
are Telugu), and, among the languages that are left, py3langid (https://github.com/adbar/py3langid, after Lui
& Baldwin 2012, https://aclanthology.org/P12-3005), restricted to the candidates.

Answers without enough letters ("42", "x = 7", "Berlin") are *undecided*: they count neither for nor against.

On NTREX-128 (150 sentences in each of 16 languages, all 16 as candidates) the tests ask that at least 99 % of
whole sentences are decided and 99.8 % of those right; cut to 20 characters, at least 85 % and 98 %.
Only candidates can be named: text in a language that is not among them is called the nearest one in its
script, or ``other`` where none uses the script.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from shifcon_fast.data.languages import find_language, primary_code, script_of
from shifcon_fast.extras import needed_for

OTHER = "other"
"""What :meth:`AnswerLanguage.identify` says of a script that no candidate uses."""

# ISO 15924 code → first words of the names of the characters. What is not here is read as Latin.
_SCRIPTS = {
    "Arab": {"ARABIC"},
    "Armn": {"ARMENIAN"},
    "Beng": {"BENGALI"},
    "Cyrl": {"CYRILLIC"},
    "Deva": {"DEVANAGARI"},
    "Ethi": {"ETHIOPIC"},
    "Geor": {"GEORGIAN"},
    "Grek": {"GREEK"},
    "Gujr": {"GUJARATI"},
    "Guru": {"GURMUKHI"},
    "Hans": {"CJK"},
    "Hant": {"CJK"},
    "Hebr": {"HEBREW"},
    "Jpan": {"CJK", "HIRAGANA", "KATAKANA"},
    "Khmr": {"KHMER"},
    "Knda": {"KANNADA"},
    "Kore": {"HANGUL", "CJK"},
    "Laoo": {"LAO"},
    "Mlym": {"MALAYALAM"},
    "Mymr": {"MYANMAR"},
    "Orya": {"ORIYA"},
    "Sinh": {"SINHALA"},
    "Taml": {"TAMIL"},
    "Telu": {"TELUGU"},
    "Thai": {"THAI"},
    "Tibt": {"TIBETAN"},
}
_IN_TWO_SCRIPTS = {"sr": {"CYRILLIC", "LATIN"}}  # where the code names none
_KANA = {"HIRAGANA", "KATAKANA"}
_JAPANESE_SHARE_OF_KANA = 0.1
_FEW_LETTERS = {"CJK": 2, "HIRAGANA": 2, "KATAKANA": 2, "HANGUL": 3}  # a sign holds more than a letter
_ENOUGH_TO_TELL_SCRIPT = 4
_ENOUGH_TO_TELL_LANGUAGE = 10


class AnswerLanguage:
    """Tells which of a few candidate languages a text is in.

    Args:
        languages: codes, in any form, of what an answer may be in, as a rule the languages of the evaluation. The
            script that a code names counts (``sr-Latn``); regions and the two forms of Chinese are not told apart.
        confidence: the probability (of py3langid, among the candidates) below which a text is undecided.

    Raises:
        ValueError: a language that py3langid does not know.
    """

    def __init__(self, languages: Sequence[str], *, confidence: float = 0.7) -> None:
        self.languages = tuple(dict.fromkeys(languages))
        self._labels = {language: _label(language) for language in self.languages}
        if unknown := [language for language, label in self._labels.items() if label is None]:
            raise ValueError(
                f"languages names {', '.join(map(repr, unknown))}, which py3langid cannot tell; it knows "
                f"{', '.join(sorted(_known_labels()))}"
            )
        self._identifier = _load_identifier()
        self.confidence = confidence

    def identify(self, text: str) -> str | None:
        """The language of ``text``, ``"other"`` where no candidate uses its script, None where it is undecided."""
        letters = Counter(script for c in text if c.isalpha() and (script := _script(c)))
        if not letters:
            return None
        script, _ = letters.most_common(1)[0]
        count = letters.total()
        if count < _FEW_LETTERS.get(script, _ENOUGH_TO_TELL_SCRIPT):
            return None
        kana = sum(letters[name] for name in _KANA)
        if kana and kana + letters["CJK"] > count / 2:
            if kana >= _JAPANESE_SHARE_OF_KANA * (kana + letters["CJK"]):
                return next((each for each, label in self._labels.items() if label == "ja"), OTHER)
            script = "CJK"
        candidates: dict[str, str] = {}  # label → the first language of it
        for language in self.languages:
            if script in _scripts(language):
                candidates.setdefault(str(self._labels[language]), language)
        if len(candidates) < 2:
            return next(iter(candidates.values()), OTHER)
        if count < _FEW_LETTERS.get(script, _ENOUGH_TO_TELL_LANGUAGE):
            return None
        self._identifier.set_languages(list(candidates))
        label, confidence = self._identifier.classify(text)
        return candidates[str(label)] if confidence >= self.confidence else None

    def agrees(self, text: str, language: str) -> bool | None:
        """Whether ``text`` is in ``language``; None where that cannot be told."""
        if language not in self.languages:
            raise ValueError(
                f"language is {language!r}; wanted one of the candidates {', '.join(self.languages)}"
            )
        found = self.identify(text)
        if found is None or found == OTHER:
            return None if found is None else False
        return self._labels[found] == self._labels[language] and bool(_scripts(found) & _scripts(language))


def can_be_told(language: str) -> bool:
    """Whether py3langid knows a language, whatever the form of its code."""
    return _label(language) is not None


def _label(language: str) -> str | None:
    """What py3langid calls a language."""
    known = _known_labels()
    return find_language(language, known) or find_language(primary_code(language), known)


def _scripts(language: str) -> set[str]:
    """First words of the names of the characters that a language is written in."""
    if script_of(language, likely=False) is None and (both := _IN_TWO_SCRIPTS.get(primary_code(language))):
        return both
    return _SCRIPTS.get(script_of(language) or "Latn", {"LATIN"})


@lru_cache(maxsize=1)
def _known_labels() -> frozenset[str]:
    return frozenset(_load_identifier().labels)


def _load_identifier() -> Any:
    with needed_for("telling the language of an answer"):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """The script as the first word of the character's Unicode name; full-width Latin letters are Latin."""
    name = unicodedata.name(letter, "")
    return name.removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").partition(" ")[0]
