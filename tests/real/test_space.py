"""Language spaces of two real models: no vector is one token's, no area a single block, no shift a destroyer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import shifcon_fast as sf
from shifcon_fast.evaluation.perplexity import measure_perplexity
from shifcon_fast.space.language_space import LanguageSpace

pytestmark = pytest.mark.timeout(900)  # real models on a busy machine

LANGUAGES = ("en", "de", "sw")


@pytest.fixture(scope="module")
def text(shifcon_data: Path) -> dict[str, list[str]]:
    lines = (shifcon_data / "ntrex128.jsonl").read_text(encoding="utf-8").splitlines()[::40]
    rows = [json.loads(line) for line in lines]
    return {code: [row[code] for row in rows] for code in LANGUAGES}


def estimate(opened: Any, text: dict[str, list[str]]) -> LanguageSpace:
    first = {code: sentences[:24] for code, sentences in text.items()}
    return sf.estimate_space(opened.model, opened.tokenizer, first, progress=False)


@pytest.fixture(scope="module")
def smollm2_space(_smollm2_once: Any, text: dict[str, list[str]]) -> LanguageSpace:
    return estimate(_smollm2_once, text)


@pytest.fixture(scope="module")
def gemma3_space(_gemma3_once: Any, text: dict[str, list[str]]) -> LanguageSpace:
    return estimate(_gemma3_once, text)


def test_the_first_word_of_smollm2_is_a_sink_and_left_out(smollm2_space: LanguageSpace) -> None:
    share = smollm2_space.sink_share.mean(dim=1)
    assert share[12] > 0.6, "what a plain mean would be made of"
    assert share[11] < 0.1
    # With the sink in, the vectors were 4 times the median norm apart at boundary 12; without, they are nowhere.
    assert all(smollm2_space.dose(k, "de") < 0.8 for k in range(30))
    norms = smollm2_space.mean.norm(dim=-1) / smollm2_space.median_norm
    assert norms.max() < 1.1, "a mean is no longer than what it is the mean of"


def test_the_commas_of_gemma3_are_sinks_at_its_first_boundary(gemma3_space: LanguageSpace) -> None:
    assert gemma3_space.sink_share[1].mean() > 0.5
    norms = gemma3_space.mean.norm(dim=-1) / gemma3_space.median_norm
    assert norms.max() < 1.1


def test_every_subspace_has_the_same_rank(smollm2_space: LanguageSpace, gemma3_space: LanguageSpace) -> None:
    for space in (smollm2_space, gemma3_space):
        assert {basis.shape[1] for basis in space.bases.values()} == {11}  # 24 sentences, halves of 12


def test_areas_are_no_single_block(smollm2_space: LanguageSpace, gemma3_space: LanguageSpace) -> None:
    for space, least in ((smollm2_space, 5), (gemma3_space, 3)):
        area = sf.recommend_area(space)
        assert area.forward is not None
        assert area.backward is not None
        assert area.backward - area.forward >= least


def test_the_recommended_shift_does_not_destroy_smollm2(
    open_smollm2: Any,
    smollm2_space: LanguageSpace,
    text: dict[str, list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the sink in the vectors, German perplexity rose 2,900 times over (examples/real_models)."""
    model, tokenizer = open_smollm2.model, open_smollm2.tokenizer
    area = sf.recommend_area(smollm2_space)
    held_out = text["de"][24:36]
    before = measure_perplexity(model, tokenizer, held_out, language="de").value
    with (
        caplog.at_level(logging.WARNING, logger="shifcon_fast"),
        sf.attach(model, smollm2_space, forward=area.forward, backward=area.backward) as handle,  # type: ignore[arg-type]
    ):
        after = measure_perplexity(model, tokenizer, held_out, language="de", handle=handle).value
    assert "longer than a hidden state" not in caplog.text
    assert before < after < 5 * before


def test_four_bits_move_the_vectors(
    smollm2: Path, open_smollm2: Any, smollm2_space: LanguageSpace, text: dict[str, list[str]]
) -> None:
    """By what attaching speaks of where a space is used with other weights."""
    from shifcon_fast.training.weights.quantization import load_quantized

    quantised = load_quantized(smollm2, None, "nf4", dtype=open_smollm2.model.dtype)
    first = {code: sentences[:24] for code, sentences in text.items()}
    space = sf.estimate_space(quantised, open_smollm2.tokenizer, first, subspaces=False, progress=False)
    whole, moved = (each.mean[10, 1:] - each.mean[10, :1] for each in (smollm2_space, space))
    relative = (moved - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert relative.min() > 0.04
    assert relative.max() < 0.3
