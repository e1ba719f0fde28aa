"""Translations as instructions: the same parallel data without the method, the fair baseline for it.

In the manner of QAlign (Zhu et al. 2024, arXiv 2401.07817), which has a model translate questions into English
before it learns to answer. How often a language is drawn follows from how many rows n it has and a temperature T,
p ∝ n^(1/T) (Arivazhagan et al. 2019, arXiv 1907.05019): T = 1 as the data has it, the larger the more evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.data.languages import primary_code
from shifcon_fast.data.parallel import Parallel, find_pivot, read_parallel
from shifcon_fast.extras import needed_for

Directions = Literal["both", "to_pivot", "from_pivot"]


def translation_instructions(
    parallel: Parallel,
    count: int,
    *,
    pivot: str = "en",
    languages: Sequence[str] | None = None,
    directions: Directions = "both",
    temperature: float = 1.0,
    allow_missing: bool = False,
    seed: int = 0,
) -> list[Instruction]:
    """So many tasks, "Translate into Swahili: ...", in an order of their own, each in the language of its response.

    Each language has its share of the tasks, p ∝ n^(1/T), rounded; within it no row is drawn again before all were,
    and with both directions they take turns.

    Args:
        parallel, languages: as for :func:`.read_parallel`.
        count: how many.
        pivot: the language that others are translated into, and from.
        directions: "both", "to_pivot" or "from_pivot".
        temperature: T > 0; with equally many rows of each language it changes nothing.
        allow_missing: take each language's rows that have it and the pivot, whatever others they lack.
        seed: of the draws; the same one gives the same tasks.

    Raises:
        DataError: as :func:`.read_parallel`; no language besides the pivot.
        ValueError: a pivot that the data does not have; a count, a temperature or directions out of range.
    """
    if count < 1:
        raise ValueError(f"count: got {count}; wanted 1 or more")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; wanted a number above 0")
    if directions not in get_args(Directions):
        raise ValueError(f"directions: got {directions!r}; wanted one of {', '.join(get_args(Directions))}")
    pairs = _pairs(parallel, pivot, languages, allow_missing=allow_missing)
    random, tasks = np.random.default_rng(seed), []
    for language, number in zip(
        pairs, _shares([len(each) for each in pairs.values()], count, temperature), strict=True
    ):
        rows: list[int] = []
        while len(rows) < number:
            rows += random.permutation(len(pairs[language])).tolist()
        for place, row in enumerate(rows[:number]):
            to_pivot = place % 2 == 0 if directions == "both" else directions == "to_pivot"
            mine, others = pairs[language][row]
            source, (target, response) = (mine, others) if to_pivot else (others, mine)
            prompt = f"Translate into {_name(target)}: {source[1]}"
            tasks.append(Instruction.single(target, prompt, response, f"translation {row} of {language!r}"))
    return [tasks[place] for place in random.permutation(len(tasks))]


Side = tuple[str, str]  # a language, and a sentence in it


def _pairs(
    parallel: Parallel, pivot: str, languages: Sequence[str] | None, *, allow_missing: bool
) -> dict[str, list[tuple[Side, Side]]]:
    """Language → its sentences with the pivot's."""
    text = read_parallel(parallel, languages=languages, allow_missing=allow_missing)
    center = find_pivot(pivot, text, "parallel")
    found = {}
    for language in text:
        if language == center:
            continue
        own = text
        if allow_missing:  # rows that lack another language have this one
            own = read_parallel(parallel, languages=[center, language], allow_missing=True)
        both = zip(own[language], own[center], strict=True)
        found[language] = [((language, mine), (center, others)) for mine, others in both]
    if not found:
        raise DataError(f"parallel: has only the pivot {pivot!r}; wanted at least one other language")
    return found


def _shares(sizes: Sequence[int], count: int, temperature: float) -> list[int]:
    """So many tasks of each language; the largest remainders are rounded up."""
    logs = np.log(sizes) / temperature
    weights = np.exp(logs - logs.max())
    exact = count * weights / weights.sum()
    shares = np.floor(exact).astype(int)
    short = np.argsort(-(exact - shares), kind="stable")[: count - int(shares.sum())]
    shares[short] += 1
    return [int(each) for each in shares]


def _name(language: str) -> str:
    """A language's name in English, as CLDR has it; its code where CLDR has none."""
    with needed_for("translation instructions (the names of languages)"):
        from babel import Locale

    names = Locale("en").languages
    written = language.replace("-", "_")
    known = next((each for each in (written, primary_code(language)) if each in names), None)
    return language if known is None else str(names[known])
