"""Contrastive batches: reproducible from their coordinates, without false negatives by identical text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from shifcon_fast.data.errors import DataError
from shifcon_fast.training.batches.contrastive_data import ContrastiveSampler

IDS = {"en": 0, "de": 1, "sw": 2, "tr": 3}


@pytest.fixture
def sampler(
    word_tokenizer: PreTrainedTokenizerFast, parallel_text: dict[str, list[str]]
) -> Callable[..., ContrastiveSampler]:
    def build(parallel: Any = None, **settings: Any) -> ContrastiveSampler:
        settings = {"batch_size": 6, **settings}
        return ContrastiveSampler(
            parallel or parallel_text, "en", word_tokenizer, IDS.__getitem__, **settings
        )

    return build


def test_draws_depend_on_seed_step_micro_batch_and_rank_only(
    sampler: Callable[..., ContrastiveSampler],
) -> None:
    first, second = sampler(seed=3), sampler(seed=3)
    second.pairs(7)  # no history
    coordinates = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [first.pairs(*each) for each in coordinates]
    assert draws == [second.pairs(*each) for each in coordinates]
    assert len({tuple(draw) for draw in draws}) == 4
    assert sampler(seed=4).pairs(0) != draws[0]


def test_batch_holds_the_pairs_in_order(
    sampler: Callable[..., ContrastiveSampler],
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
) -> None:
    built = sampler()
    pairs, batch = built.pairs(5), built.batch(5)
    texts = [parallel_text["en"][row] for row, _ in pairs] + [parallel_text[code][row] for row, code in pairs]
    for row, text in enumerate(texts):
        ids = word_tokenizer(text).input_ids
        length = len(ids)
        assert batch["input_ids"][row].tolist() == ids + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["attention_mask"][row].sum() == length
        assert batch["pool_mask"][row].tolist() == [
            0 < i < length for i in range(batch["input_ids"].shape[1])
        ]
    assert batch["language_ids"].tolist() == [0] * 6 + [IDS[code] for _, code in pairs]


def test_languages_are_mixed_or_one_a_batch(sampler: Callable[..., ContrastiveSampler]) -> None:
    mixed = [{code for _, code in sampler().pairs(step)} for step in range(20)]
    assert set().union(*mixed) == {"de", "sw", "tr"}
    assert max(map(len, mixed)) > 1
    single = [{code for _, code in sampler(mixed_languages=False).pairs(step)} for step in range(20)]
    assert set().union(*single) == {"de", "sw", "tr"}
    assert max(map(len, single)) == 1


def test_no_text_twice_in_a_batch(sampler: Callable[..., ContrastiveSampler]) -> None:
    english = ["Ada", "Ada", "Ben", "Cem", "Dina", "Eva"]
    german = ["Eva lives", "Ben lives", "Cem lives", "Dina", "Cem lives", "Femi"]
    built = sampler({"en": english, "de": german}, batch_size=3)
    for step in range(50):
        pairs = built.pairs(step)
        texts = [text for row, _ in pairs for text in {english[row], german[row]}]
        assert len(texts) == len(set(texts)) == 6
    # Rows 0 and 1 share their English, 2 and 4 their German, and row 3's German is row 4's English.
    assert {row for step in range(50) for row, _ in built.pairs(step)} == {0, 1, 2, 3, 4, 5}


def test_processes_together_have_the_batch_of_one(
    sampler: Callable[..., ContrastiveSampler], parallel_text: dict[str, list[str]]
) -> None:
    """Whose negatives are gathered, and for which another process's copy of a sentence would be one."""
    for mixed in (True, False):
        alone = sampler(batch_size=12, mixed_languages=mixed)
        ranks = [sampler(batch_size=4, processes=3, mixed_languages=mixed)] * 3
        for step in range(4):
            parts = [each.pairs(step, 0, rank) for rank, each in enumerate(ranks)]
            assert [len(part) for part in parts] == [4, 4, 4]
            assert [pair for part in parts for pair in part] == alone.pairs(step)
    few = {code: texts[:11] for code, texts in parallel_text.items()}
    with pytest.raises(DataError, match=r"11 distinct .* contrastive_batch_size = 4 x 3 processes"):
        sampler(few, batch_size=4, processes=3)


def test_lengths_and_official_pooling(sampler: Callable[..., ContrastiveSampler]) -> None:
    batch = sampler(max_length_pivot=3, max_length_other=4, pool_all_tokens=True).batch(0)
    assert batch["attention_mask"][:6].sum(1).tolist() == [3] * 6
    assert set(batch["attention_mask"][6:].sum(1).tolist()) <= {3, 4}
    assert (batch["pool_mask"] == batch["attention_mask"].bool()).all()


def test_bad_data(sampler: Callable[..., ContrastiveSampler], parallel_text: dict[str, list[str]]) -> None:
    with pytest.raises(DataError, match="has de; wanted the pivot 'en' too"):
        sampler({"de": parallel_text["de"]})
    with pytest.raises(DataError, match="has only the pivot 'en'"):
        sampler({"en": parallel_text["en"]})
    with pytest.raises(
        DataError, match="'de' has 2 distinct sentences; wanted at least contrastive_batch_size = 6"
    ):
        sampler({"en": parallel_text["en"][:8], "de": ["a", "b"] * 4})
    crossed = sampler({"en": ["Ada", "Ben"], "de": ["Ben", "Ada"]}, batch_size=2)
    with pytest.raises(DataError, match="only 1 rows whose sentences all differ"):
        crossed.pairs(0)


def test_sentences_without_content_are_passed_over_and_the_first_is_named(
    sampler: Callable[..., ContrastiveSampler],
    parallel_text: dict[str, list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = {language: list(parallel_text[language][:8]) for language in ("en", "de")}
    text["de"][2], text["en"][5] = "xyz", "zyx"  # unknown words are a special token
    drawn = sampler(text)
    for step in range(8):
        assert {row for row, _ in drawn.pairs(step)} == {0, 1, 3, 4, 6, 7}
        assert drawn.batch(step)["pool_mask"].any(dim=1).all()
    assert len([record for record in caplog.records if "has no content token" in record.message]) == 1
    with pytest.raises(DataError, match="only 6 rows whose sentences all differ and have a content token"):
        sampler(text, batch_size=7).pairs(0)
    assert len(sampler(text, batch_size=8, pool_all_tokens=True).pairs(0)) == 8
