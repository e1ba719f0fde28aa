"""Content tokens: what is left out, and that everything that averages a sentence leaves out the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shifcon_fast.evaluation.retrieval import sentence_representations
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.content import MASSIVE_NORM, content_mask, ordinary_tokens
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.objective.mcl import contrastive_representations
from shifcon_fast.training.batches.contrastive_data import ContrastiveSampler

Text = dict[str, list[str]]
BOUNDARIES = range(4)


def test_special_tokens_padding_and_the_first_attended_position_are_left_out() -> None:
    tokens = torch.tensor([[1, 7, 8, 2, 0], [0, 0, 7, 8, 9], [7, 3, 8, 9, 0]])  # BOS; padded left; no BOS
    attended = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    expected = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]).bool()
    assert torch.equal(content_mask(tokens, attended, [0, 1, 2, 3]), expected)
    assert torch.equal(content_mask(tokens, attended.bool(), torch.tensor([0, 1, 2, 3])), expected)
    assert torch.equal(content_mask(tokens, None, []), torch.tensor([[0, 1, 1, 1, 1]] * 3).bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_massive_norm_are_left_out_against_the_median_of_the_mask(dtype: torch.dtype) -> None:
    norms = torch.tensor([[99.0, 1.0, 1.25, 3.0, 3.75, 99.0], [8.0, 8.0, 8.0, 8.0, 8.0, 8.0]])
    hidden = torch.zeros(2, 6, 5, dtype=dtype)
    hidden[..., 3] = norms.to(dtype)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]).bool()
    found, medians, lengths = ordinary_tokens(hidden, mask)
    assert torch.equal(lengths, norms)
    assert MASSIVE_NORM == 3.0
    assert medians.tolist() == [1.25, 8.0]  # of 1, 1.25, 3, 3.75 the lower middle
    assert found.tolist() == [[False, True, True, True, True, False], [False, True, *[False] * 4]]
    hidden[0, 4, 3] = 4.0
    assert ordinary_tokens(hidden, mask)[0][0].tolist() == [False, True, True, True, False, False]


def test_empty_rows_and_broken_numbers() -> None:
    hidden = torch.ones(2, 3, 4)
    hidden[1, 2] = float("inf")
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]]).bool()
    found, medians, _ = ordinary_tokens(hidden, mask)
    assert torch.equal(found, mask), "an overflow is not taken for a sink: it has to show in the mean"
    assert medians[0].isnan()
    assert not medians.requires_grad


def add_sink(model: PreTrainedModel, token: int) -> None:
    """Make a token what a sink is: of a norm far above the others' at every boundary."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] *= 100


def naive_means(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentence: str, sink: int
) -> Tensor:
    """(L, d) float64: Hugging Face's hidden states, averaged over all tokens but the first and the sink."""
    ids = tokenizer(sentence)["input_ids"]
    kept = [i for i, token in enumerate(ids) if i > 0 and token != sink]
    with torch.no_grad():
        states = torch.cat(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1])
    return states[:, kept].double().mean(1)


@pytest.mark.parametrize("bos", [True, False])
def test_everything_that_averages_a_sentence_leaves_out_the_same_tokens(
    tiny_model: Callable[..., PreTrainedModel],
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: Text,
    bos: bool,
) -> None:
    model, tokenizer = tiny_model(), copy.deepcopy(word_tokenizer)
    if not bos:
        tokenizer.backend_tokenizer.post_processor = None
    text = {language: parallel_text[language][3::4] for language in ("en", "de")}  # "Ada eats bread and fish"
    sink = tokenizer.convert_tokens_to_ids("and")
    add_sink(model, sink)
    add_sink(model, tokenizer.convert_tokens_to_ids("und"))
    expected = {
        language: torch.stack(
            [
                naive_means(model, tokenizer, each, tokenizer.convert_tokens_to_ids(word))
                for each in sentences
            ],
            dim=1,
        ).float()
        for (language, sentences), word in zip(text.items(), ("and", "und"), strict=True)
    }

    space = estimate_space(model, tokenizer, text, progress=False, subspaces=False)
    torch.testing.assert_close(space.mean[:, 0], expected["en"].mean(1), rtol=1e-4, atol=1e-5)
    assert (space.sink_share > 0.5).all()

    found = sentence_representations(model, tokenizer, text["de"], BOUNDARIES, language="de")
    torch.testing.assert_close(found, expected["de"], rtol=1e-4, atol=1e-5)

    handle = attach(model, space, forward=1, backward=3)
    sampler = ContrastiveSampler(text, "en", tokenizer, space.language_id, batch_size=4)
    rows = [row for row, _ in sampler.pairs(0)]
    pivot, other = contrastive_representations(model, sampler.batch(0), BOUNDARIES, shifted=False)
    torch.testing.assert_close(pivot, expected["en"][:, rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other, expected["de"][:, rows], rtol=1e-4, atol=1e-5)
    handle.detach()


def test_a_shift_moves_the_mean_by_its_vector_whatever_was_left_out(
    tiny_model: Callable[..., PreTrainedModel], random_space: Callable[..., object], batch: dict[str, Tensor]
) -> None:
    model = tiny_model()
    add_sink(model, int(batch["input_ids"][0, 5]))
    space = random_space(model)
    mask = content_mask(batch["input_ids"], batch["attention_mask"], [0, 1, 2])
    plain = boundary_representations(model, **batch, pool_mask=mask, boundaries=[1])
    with attach(model, space, forward=1, backward=3):  # type: ignore[arg-type]
        moved = boundary_representations(
            model, **batch, pool_mask=mask, boundaries=[1], language_ids=torch.tensor([1, 2, 0, -1])
        )
    shift = space.shift_vectors(1)  # type: ignore[attr-defined]
    torch.testing.assert_close(moved[0, 0], plain[0, 0] + shift[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved[0, 2], plain[0, 2] + shift[0], rtol=1e-5, atol=1e-5)


def test_the_official_recipe_keeps_massive_tokens(
    tiny_model: Callable[..., PreTrainedModel], batch: dict[str, Tensor]
) -> None:
    model = tiny_model()
    add_sink(model, int(batch["input_ids"][0, 5]))
    every = batch["attention_mask"].bool()
    kept = boundary_representations(model, **batch, pool_mask=every, boundaries=[0], keep_massive=True)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(kept[0, 0], embedded[0].mean(0))
