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

from py3langid.langid import MODEL_FILE, LanguageIdentifier

OTHER = "other"
"""What :meth:`AnswerLanguage.identify` says of a script that no candidate uses."""

_SCRIPTS = {
    "zh": {"CJK"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA"},
    "ko": {"HANGUL", "CJK"},
    "th": {"THAI"},
    "lo": {"LAO"},
    "km": {"KHMER"},
    "my": {"MYANMAR"},
    "el": {"GREEK"},
    "he": {"HEBREW"},
    "ka": {"GEORGIAN"},
    "hy": {"ARMENIAN"},
    "am": {"ETHIOPIC"},
    "si": {"SINHALA"},
    "ta": {"TAMIL"},
    "te": {"TELUGU"},
    "kn": {"KANNADA"},
    "ml": {"MALAYALAM"},
    "gu": {"GUJARATI"},
    "pa": {"GURMUKHI"},
    **{code: {"ARABIC"} for code in ("ar", "fa", "ur", "ps", "ug")},
    **{code: {"BENGALI"} for code in ("bn", "as")},
    **{code: {"DEVANAGARI"} for code in ("hi", "mr", "ne")},
    **{code: {"CYRILLIC"} for code in ("ru", "uk", "be", "bg", "mk", "kk", "ky", "mn", "tg")},
    "sr": {"CYRILLIC", "LATIN"},
}
_LATIN = {"LATIN"}  # every language that the table leaves out
_KANA = {"HIRAGANA", "KATAKANA"}
_JAPANESE_SHARE_OF_KANA = 0.1
_FEW_LETTERS = {"CJK": 2, "HIRAGANA": 2, "KATAKANA": 2, "HANGUL": 3}  # a sign holds more than a letter
_ENOUGH_TO_TELL_SCRIPT = 4
_ENOUGH_TO_TELL_LANGUAGE = 10


class AnswerLanguage:
    """Tells which of a few candidate languages a text is in.

    Args:
        languages: ISO 639-1 codes that an answer may be in, as a rule those of the evaluation.
        confidence: the probability (of py3langid, among the candidates) below which a text is undecided.

    Raises:
        ValueError: a code that py3langid does not know.
    """

    def __init__(self, languages: Sequence[str], *, confidence: float = 0.7) -> None:
        self.languages = tuple(dict.fromkeys(languages))
        if unknown := [language for language in self.languages if language not in known_languages()]:
            raise ValueError(
                f"languages names {', '.join(map(repr, unknown))}, which py3langid cannot tell; it knows "
                f"{', '.join(sorted(known_languages()))}"
            )
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
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
                return "ja" if "ja" in self.languages else OTHER
            script = "CJK"
        candidates = [language for language in self.languages if script in _SCRIPTS.get(language, _LATIN)]
        if len(candidates) < 2:
            return candidates[0] if candidates else OTHER
        if count < _FEW_LETTERS.get(script, _ENOUGH_TO_TELL_LANGUAGE):
            return None
        self._identifier.set_languages(candidates)
        language, confidence = self._identifier.classify(text)
        return str(language) if confidence >= self.confidence else None

    def agrees(self, text: str, language: str) -> bool | None:
        """Whether ``text`` is in ``language``; None where that cannot be told."""
        if language not in self.languages:
            raise ValueError(
                f"language is {language!r}; wanted one of the candidates {', '.join(self.languages)}"
            )
        found = self.identify(text)
        return None if found is None else found == language


@lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """The ISO 639 codes that py3langid can tell apart."""
    return frozenset(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).labels)


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """The script as the first word of the character's Unicode name; full-width Latin letters are Latin."""
    name = unicodedata.name(letter, "")
    return name.removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").partition(" ")[0]
